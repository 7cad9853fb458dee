"""Grouped GEMM for routed experts, and the sum over a token's slots.

A slot is a (token, k) pair, numbered token * topk + k; `order` lists the slots by expert (slots
to skip last), and "sorted" rows follow it. A tile is BLOCK_M sorted rows of one expert, given on
the device: tile_expert [T], tile_start [T] (its first sorted row), ends [E] (one past each
expert's last sorted row). T is a bound: tiles with expert E do nothing, so the host needs no
counts.

gate_up   a [tokens, K] gathered through order  -> out [slots, N], sorted rows
down      a [slots, K] sorted rows              -> out [slots, N], slot rows, times slot_weights
combine   out [tokens, N] = sum over k of slots [tokens * topk, N], skipping ids outside [0, E)

Operands and accumulation as in gemm.py, with w [E, N, K], sf [E, .., ..] and c [E, ..]. A product
is weighted in float32 and rounded once; slots are summed in float32 in order and rounded once.
"""

import torch
import triton
import triton.language as tl

from .config import FMA, dependent_launch, kernel_codes
from .gemm import multiply
from .replay import Launch, launched
from .tile import wait_for_inputs
from .ue8m0 import round_to, to_float


@triton.jit
def _grouped_gemm_kernel(
    a, a_s, w, sf, c, out, order, slot_weights, tile_expert, tile_start, ends,
    N, K, stride_am, stride_asm, stride_we, stride_wn, stride_se, stride_sn, stride_ce,
    num_experts, topk,
    GRAN_N: tl.constexpr, GRAN_K: tl.constexpr, HAS_C: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    GATHER: tl.constexpr, QUANTIZED: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.load(tile_expert + tl.program_id(0)).to(tl.int64)
    if expert >= num_experts:
        return
    first_column = tl.program_id(1) * BLOCK_N
    end = tl.load(ends + expert)
    row = tl.load(tile_start + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    used = row < end
    # Rows past the end repeat the expert's last one: their products are not stored.
    row = tl.minimum(row, end - 1).to(tl.int64)
    slot = tl.load(order + row).to(tl.int64)
    if GATHER:
        source, target = slot // topk, row
    else:
        source, target = row, slot
    acc = multiply(
        a, a_s, w + expert * stride_we, sf + expert * stride_se, source, first_column, N, K,
        stride_am, stride_asm, stride_wn, stride_sn,
        BLOCK_M, BLOCK_N, BLOCK_K, GRAN_N, GRAN_K, EVEN_K, QUANTIZED, BLOCK_SCALED,
    )  # fmt: skip
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = columns < N
    if HAS_C:
        factor = tl.load(c + expert * stride_ce + columns // GRAN_N, mask=inside, other=0.0)
        acc *= factor[None, :]
    if HAS_WEIGHTS:
        acc *= to_float(tl.load(slot_weights + slot))[:, None]
    mask = used[:, None] & inside[None, :]
    value = round_to(acc, out.dtype.element_ty)
    tl.store(out + target[:, None] * N + columns[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_experts"])
def _combine_kernel(
    slots, topk_ids, out, N, num_experts,
    TOPK: tl.constexpr, IDS: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part of a token's row; all its slots are loaded at once. IDS: a power of two."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    each = tl.arange(0, IDS)
    # Before the wait: what wrote the ids ended before the kernel that let this one start.
    expert = tl.load(topk_ids + row * TOPK + each, mask=each < TOPK, other=-1)
    used = (expert >= 0) & (expert < num_experts)
    bits = tl.sum(used.to(tl.int64) << each, 0)
    wait_for_inputs(PDL)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for k in tl.static_range(TOPK):
        # A skipped slot was never written.
        source = slots + (row * TOPK + k) * N + column
        some = tl.where((bits >> k) & 1 != 0, N, 0)
        acc += to_float(tl.load(source, mask=column < some, other=0.0))
    tl.store(out + row * N + column, round_to(acc, out.dtype.element_ty), mask=column < N)


@launched
def launch(
    a: torch.Tensor, a_s: torch.Tensor | None, w: torch.Tensor, sf: torch.Tensor,
    c: torch.Tensor | None, gran: tuple[int, int], order: torch.Tensor,
    slot_weights: torch.Tensor | None, tiles: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    topk: int, gather: bool, config: dict[str, int], out: torch.Tensor,
) -> Launch:  # fmt: skip
    """tiles = (tile_expert, tile_start, ends), for the BLOCK_M of config."""
    (E, N, K), (tile_expert, tile_start, ends) = w.shape, tiles
    grid = (tile_expert.shape[0], triton.cdiv(N, config["BLOCK_N"]))
    return Launch(
        _grouped_gemm_kernel, grid,
        kernel_codes(a), a_s, kernel_codes(w), sf, c, out, order, slot_weights, tile_expert,
        tile_start, ends, N, K,
        a.stride(0) if a.shape[0] > 1 else K, 0 if a_s is None else a_s.shape[1],
        w.stride(0), w.stride(1), sf.stride(0), sf.stride(1), 0 if c is None else c.stride(0),
        E, topk,
        GRAN_N=gran[0], GRAN_K=gran[1], HAS_C=c is not None,
        HAS_WEIGHTS=slot_weights is not None, GATHER=gather, QUANTIZED=a_s is not None,
        EVEN_K=K % config["BLOCK_K"] == 0, **config, **FMA,
    )  # fmt: skip


@launched
def combine(
    slots: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, out: torch.Tensor
) -> Launch:
    """Sum slots [M * topk, N] over each token's valid topk_ids [M, topk] into out [M, N].

    topk is at most 64. What wrote topk_ids has ended when the kernel before lets this one start.
    """
    (M, N), topk = out.shape, topk_ids.shape[1]
    assert topk <= 64, f"{topk=}"
    block = 1024  # 16 bytes a thread and slot
    return Launch(
        _combine_kernel, (M, triton.cdiv(N, block)),
        slots, topk_ids, out, N, num_experts, TOPK=topk, IDS=triton.next_power_of_2(topk),
        BLOCK_N=block, num_warps=4, **dependent_launch(out.device),
    )  # fmt: skip
