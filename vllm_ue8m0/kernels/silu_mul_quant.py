"""silu(gate) * up, quantized: [E, M, 2 I] -> e4m3 [E, M, I], one scale per group; or bf16.

gate_up: gate columns first, unit stride along columns. silu(gate) is rounded to the input's dtype,
and so is its product with up, as DeepSeek's `F.silu(w1(x)) * w3(x)` rounds them; groups of the
result are then quantized exactly as act_quant does, with its scales, layouts, counts and
destinations. With s None nothing is quantized and out has the input's dtype.
silu is computed with the device's fast exponential: before rounding a few float32 ulp from exact.
"""

import torch
import triton
import triton.language as tl

from .config import FMA, TileConfig, dependent_launch, starts_product
from .replay import Launch, launched
from .tile import (
    find_tile,
    scale_offset,
    start_dependents_and_wait,
    store_tile,
    used_tiles,
    wait_for_inputs,
)
from .ue8m0 import round_to, to_float


@triton.jit
def _tile(
    gate_up, out, s, destinations, expert, tile, first_group, limit, M, K, groups, stride_e,
    stride_m, stride_s,
    FLOOR: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    MN_MAJOR: tl.constexpr, PACKED: tl.constexpr, COPIES: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = gate_up.dtype.element_ty
    row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    k = first_group * GROUP + tl.arange(0, GROUPS * GROUP)
    mask = (row < limit)[:, None] & (k < K)[None, :]
    source = gate_up + expert * stride_e + row[:, None] * stride_m + k[None, :]
    gate = to_float(tl.load(source, mask=mask, other=0.0))
    up = to_float(tl.load(source + K, mask=mask, other=0.0))
    silu = to_float(round_to(gate / (1.0 + tl.exp(-gate)), dtype))
    hidden = round_to(silu * up, dtype)
    out += expert * M * K
    if QUANTIZE:
        store_tile(
            to_float(hidden), out, s + scale_offset(expert, M, groups, stride_s, MN_MAJOR, PACKED),
            destinations, row, first_group, limit, K, groups, stride_s,
            FLOOR, GROUP, ROWS, GROUPS, MN_MAJOR, PACKED, COPIES,
        )  # fmt: skip
    else:
        tl.store(out + row[:, None] * K + k[None, :], hidden, mask=mask)


@triton.jit(do_not_specialize=["M", "stride_s", "early"])
def _silu_mul_quant_kernel(
    gate_up, out, s, counts, destinations, E, M, K, groups, stride_e, stride_m, stride_s, early,
    FLOOR: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    MN_MAJOR: tl.constexpr, PACKED: tl.constexpr, COPIES: tl.constexpr, EXPERTS: tl.constexpr,
    QUANTIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if early:
        start_dependents_and_wait(PDL)
    else:
        wait_for_inputs(PDL)
    columns = tl.cdiv(groups, GROUPS)
    index, first_group = tl.program_id(0) // columns, tl.program_id(0) % columns * GROUPS
    if EXPERTS > 0:
        tiles, ends = used_tiles(counts, M, E, ROWS, EXPERTS)
        for i in range(index, tl.sum(tiles, 0), tl.num_programs(0) // columns):
            expert, tile, limit = find_tile(i, tiles, ends, counts, M)
            _tile(
                gate_up, out, s, destinations, expert, tile, first_group, limit, M, K, groups,
                stride_e, stride_m, stride_s,
                FLOOR, GROUP, ROWS, GROUPS, MN_MAJOR, PACKED, COPIES, QUANTIZE,
            )  # fmt: skip
    else:
        _tile(
            gate_up, out, s, destinations, tl.program_id(1).to(tl.int64), index, first_group, M, M,
            K, groups, stride_e, stride_m, stride_s,
            FLOOR, GROUP, ROWS, GROUPS, MN_MAJOR, PACKED, COPIES, QUANTIZE,
        )  # fmt: skip


@launched
def launch(
    gate_up: torch.Tensor,
    out: torch.Tensor,
    s: torch.Tensor | None,
    group: int,
    floor: int,
    mn_major: bool,
    config: TileConfig,
    counts: torch.Tensor | None = None,
    destinations: torch.Tensor | None = None,
) -> Launch:
    """Write silu(gate) * up to out, quantized if s is given."""
    E, M, K = *gate_up.shape[:2], out.shape[-1]
    groups = triton.cdiv(K, group)
    return Launch(
        _silu_mul_quant_kernel, config.grid(E, M, groups, counts is not None),
        gate_up, out if s is None else out.view(torch.uint8), s, counts, destinations, E, M, K,
        groups, gate_up.stride(0) if E > 1 else 0, gate_up.stride(1) if M > 1 else 2 * K,
        0 if s is None else s.stride(2),
        int(counts is None and destinations is None and starts_product(M, groups)),
        FLOOR=floor, GROUP=group, ROWS=config.rows, GROUPS=config.groups, MN_MAJOR=mn_major,
        PACKED=s is not None and s.dtype == torch.int32,
        COPIES=0 if destinations is None else destinations.shape[1],
        EXPERTS=0 if counts is None else triton.next_power_of_2(E), QUANTIZE=s is not None,
        num_warps=config.num_warps, **dependent_launch(gate_up.device), **FMA,
    )  # fmt: skip
