"""Results of `bench e2e` as records, and as text what records do not hold."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from ..versions import versions
from .e2e import OURS, PEER, QUANTIZATION, Results, Setup
from .e2e_split import BF16, REST
from .records import Record, Variant

KERNELS = 12  # that are shown of a step


def records(setup: Setup, results: Results) -> Iterator[Record]:
    """Records of what our side has, with the other's where it was measured too."""
    ours, peer = results.get(OURS, {}), results.get(PEER, {})
    shared: Variant = {"layers": setup.layers, "tp": setup.tp, "routing": setup.routing}
    if setup.model is not None:
        shared = {"model": Path(setup.model).name, **shared}

    def record(bench: str, M: int | None, variant: Variant, times: list[float | None],
               context: dict[str, float | None], gpu: str) -> Record:  # fmt: skip
        own, other = times
        assert own is not None
        return Record(
            bench=bench, M=M, N=None, K=None, ours_us=own,
            peers_us={} if other is None else {PEER: other}, limit_us=None,
            context_us={name: us for name, us in context.items() if us}, num_bytes=None,
            ours=f"vllm --quantization {QUANTIZATION[OURS]}", gpu=gpu, versions=versions(),
            date=date.today().isoformat(), variant=variant,
        )  # fmt: skip

    for name, one in ours.items():
        other, (bench, _, batch) = peer.get(name, {}), name.partition(" ")
        both = (one, other)
        if bench.startswith("start"):
            memory = {
                f"{side}_mib": round(result["memory"] / 2**20)
                for side, result in zip(QUANTIZATION, both, strict=True)
                if result.get("memory")
            }
            times = [r["start_s"] * 1e6 if r else None for r in both]
            yield record(bench, None, {**shared, **memory}, times, {}, one["gpu"])
        elif bench == "prefill":
            prompts, tokens = setup.prefill
            times, gpu = ([r.get(kind) for r in both] for kind in ("wall_us", "gpu_us"))
            context = {"ours on the GPU": gpu[0], f"{PEER} on the GPU": gpu[1]}
            yield record(bench, prompts * tokens, shared, times, context, one["gpu"])
        elif bench == "serve":
            tokens_in, tokens_out = setup.serve
            load: Variant = {"rate": f"{batch}/s", "input": tokens_in, "output": tokens_out}
            for kind in ("ttft", "tpot"):
                times = [r.get(f"{kind}_us") for r in both]
                context = {
                    f"{name}, {when}": r.get(key)
                    for when, key in (("99 %", f"{kind}_p99_us"), ("at first", f"first_{kind}_us"))
                    for name, r in zip(QUANTIZATION, both, strict=True)
                }
                yield record(f"serve_{kind}", None, {**load, **shared}, times, context, one["gpu"])
        else:
            variant: Variant = {"batch": int(batch), **shared}
            times, wall = ([r.get(kind) for r in both] for kind in ("gpu_us", "wall_us"))
            context = {"ours with the host": wall[0], f"{PEER} with the host": wall[1]}
            yield record(bench, int(batch), variant, times, context, one["gpu"])
            for part, us in one.get("parts", {}).items():
                if us:
                    parts = [us, other.get("parts", {}).get(part) or None]
                    extra: Variant = {"part": part, **variant}
                    yield record("decode_part", int(batch), extra, parts, {}, one["gpu"])


def details(results: Results) -> str:
    """Seconds of starts by phase, the most expensive kernels of decode steps, answers a second."""
    lines: list[str] = []
    for side, found in results.items():
        for name, one in found.items():
            if name.startswith("start"):
                held = one.get("memory")
                memory = f", {held / 2**30:.2f} GiB beside the KV cache" if held else ""
                lines.append(f"{side} {name}: {one['start_s']:.1f} s{memory}")
                lines += [f"  {seconds:8.1f} s  {what}" for what, seconds in one["phases"].items()]
            if name.startswith("serve"):
                lines.append(f"{side} {name}: {one['requests_per_s']:.2f} requests/s answered")
            lines += _kernels(f"{side} {name}", one)
    for name, one in results.get(OURS, {}).items():
        both = [_others(one), _others(results.get(PEER, {}).get(name, {}))]
        if all(both):
            lines.append(
                f"{name}, outside routed experts, lm_head, attention and sampling: ours "
                f"{both[0]:.0f} us, {PEER} {both[1]:.0f}, ratio {both[1] / both[0]:.2f}"
            )
    return "\n".join(lines)


def _others(one: dict[str, Any]) -> float:
    parts: dict[str, float] = one.get("parts", {})
    return parts.get(BF16, 0.0) + parts.get(REST, 0.0)


def _kernels(title: str, one: dict[str, Any]) -> Iterator[str]:
    if one.get("kernels"):
        total = sum(one["parts"].values())
        yield f"{title}: kernels {total:.0f} us of {one['gpu_us']:.0f}, launches, part, name"
        for name, part, us, count in one["kernels"][:KERNELS]:
            yield f"  {us:8.1f} us  {count:5.1f}  {part:<15} {name[:80]}"
