"""Where the time of a step goes, from a profiler's trace: every moment belongs to one kernel.

Kernels overlap, by streams and by programmatic dependent launch, under which one waits on the GPU
for the one before it: what two share belongs to the one that started first. Then the parts add up
to the time in which the GPU worked; gaps between kernels are nobody's.

A part is told by where a kernel was launched (lm_head, sampling: ranges that e2e_worker.py names),
or by its name. Quantizers and activations serve several: they belong with the next other kernel of
their stream.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

RANGE = "ue8m0."  # names of ranges: RANGE + part
SETTLED = "ue8m0: the steps that count begin"
EXPERTS, LM_HEAD, ATTENTION, SAMPLING = "routed experts", "lm_head", "attention", "sampling"
BF16, REST = "bf16 products", "rest"
# bf16 products: the router's and MLA's absorbed ones, neither of which is quantized.
PARTS = (EXPERTS, LM_HEAD, ATTENTION, SAMPLING, BF16, REST)
_NAMES = (
    (
        EXPERTS,
        r"fused_moe|moe_align|moe_sum|count_and_sort_expert|^_expert_|_route_quant|"
        r"^_(count|place|tiles|combine)_kernel|_grouped_gemm|_batched_gemm|ep_(scatter|gather)",
    ),
    (
        ATTENTION,
        r"flash|fmha|mla|attn|attention|reshape_and_cache|gather_(and_maybe_dequant_)?cache|"
        r"merge_state",
    ),
    (
        BF16,
        r"nvjet|cublas|bf16bf16|gemv|splitkreduce|router_gemm|cutlass.*bf16|^_(decode_bmm|sum_parts)",
    ),
)
_AMBIGUOUS = r"quant|silu|act_and_mul"
TOP = 40


@dataclass
class Kernel:
    name: str
    start: float  # us
    end: float
    stream: int
    part: str | None = None  # known from where it was launched


def split(trace: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Of a Chrome trace of `steps` steps: {"parts": {part: us of a step}, "kernels": [...]}.

    kernels: [name, part, us of a step, launches of a step], the TOP by time. What was launched
    before a range SETTLED is left out, and no step of `steps`.
    """
    kernels = read(trace["traceEvents"])
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    rows: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kernel, time_us in own_times(kernels):
        part = kernel.part or REST
        parts[part] += time_us / steps
        row = rows[kernel.name, part]
        row[0] += time_us / steps
        row[1] += 1 / steps
    ranked = sorted(rows.items(), key=lambda item: -item[1][0])
    return {
        "parts": {part: round(time_us, 2) for part, time_us in parts.items()},
        "kernels": [
            [name[:120], part, round(time_us, 2), round(count, 2)]
            for (name, part), (time_us, count) in ranked[:TOP]
        ],
    }


def read(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """Kernels and copies with their parts, by start."""
    launched: dict[Any, float] = {}
    ranges: list[tuple[float, float, str]] = []
    found: list[tuple[Kernel, Any]] = []
    settled = 0.0
    for event in events:
        kind, args = event.get("cat"), event.get("args", {})
        if kind in ("cuda_runtime", "cuda_driver"):
            launched[args.get("correlation")] = event["ts"]
        elif kind == "user_annotation" and event["name"].startswith(RANGE):
            end = event["ts"] + event["dur"]
            ranges.append((event["ts"], end, event["name"].removeprefix(RANGE)))
        elif kind == "user_annotation" and event["name"] == SETTLED:
            settled = event["ts"]
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            start = event["ts"]
            kernel = Kernel(event["name"], start, start + event["dur"], args.get("stream", 0))
            found.append((kernel, args.get("correlation")))
    found = [pair for pair in found if launched.get(pair[1], pair[0].start) >= settled]
    found.sort(key=lambda pair: pair[0].start)
    for kernel, correlation in found:
        at = launched.get(correlation)
        if at is not None:
            kernel.part = next((part for low, high, part in ranges if low <= at <= high), None)
    kernels = [kernel for kernel, _ in found]
    name_parts(kernels)
    return kernels


def name_parts(kernels: list[Kernel]) -> None:
    """Parts of kernels that were launched in no range, by name."""
    following: dict[int, str] = {}
    for kernel in reversed(kernels):
        if kernel.part is None:
            part = part_of(kernel.name)
            if part is None:  # its result is for the next one
                part = EXPERTS if following.get(kernel.stream) == EXPERTS else REST
            else:
                following[kernel.stream] = part
            kernel.part = part


def part_of(name: str) -> str | None:
    """None: of several parts."""
    for part, pattern in _NAMES:
        if re.search(pattern, name, re.IGNORECASE):
            return part
    return None if re.search(_AMBIGUOUS, name, re.IGNORECASE) else REST


def own_times(kernels: Iterable[Kernel]) -> Iterable[tuple[Kernel, float]]:
    """What each kernel adds to the time in which the GPU works; kernels by start."""
    until = float("-inf")
    for kernel in kernels:
        yield kernel, max(0.0, kernel.end - max(kernel.start, until))
        until = max(until, kernel.end)
