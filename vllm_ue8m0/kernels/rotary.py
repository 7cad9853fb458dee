"""MLA's rotary embedding in place: the last R columns of q [M, H, D]'s heads, and k [M, R].

q, k and cos_sin [P, R] of one dtype, unit stride along columns; rounding and pairs as in
reference.rotary_embedding, bit for bit. LLVM multiplies and adds 16-bit numbers as such, and would
make an FMA of both in spite of the rounding between (seen on an H200): hence NO_FMA. A program
rotates HEADS heads of a row, pairs within a thread; the last one of a row its key, and writes what
attention keeps of the row: latent [M, L] and the key, to a slot of cache [B, S, L + R].
"""

import torch
import triton
import triton.language as tl

from .config import NO_FMA, dependent_launch
from .replay import Launch, launched
from .tile import start_dependents_and_wait
from .ue8m0 import round_to, to_float

MOST_HEADS = 32


@triton.jit
def _rotate(x, mask, cos, sin, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """x: pointers [HEADS, 2 * PAIRS]. What is there now."""
    dtype: tl.constexpr = x.dtype.element_ty
    values = to_float(tl.load(x, mask=mask, other=0.0))
    even, odd = tl.split(tl.reshape(values, [HEADS, PAIRS, 2]))
    first = to_float(round_to(even * cos, dtype)) - to_float(round_to(odd * sin, dtype))
    second = to_float(round_to(odd * cos, dtype)) + to_float(round_to(even * sin, dtype))
    rotated = round_to(tl.reshape(tl.join(first, second), [HEADS, 2 * PAIRS]), dtype)
    tl.store(x, rotated, mask=mask)
    return rotated


@triton.jit(do_not_specialize=["rows"])
def _rotary_kernel(
    q, k, positions, cos_sin, latent, cache, slots, rows, H, S, L, stride_qm, stride_qh, stride_km,
    stride_c, stride_lm, stride_block, stride_slot, NOPE: tl.constexpr, R: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, LATENT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """NOPE: columns of a head before the last R. PAIRS, LATENT: powers of two, at least R / 2, L.

    rows: that have a slot; of these some are -1.
    """
    start_dependents_and_wait(PDL)
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair, column = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    table = cos_sin + tl.load(positions + row).to(tl.int64) * stride_c + pair
    cos = to_float(tl.load(table, mask=pair < R // 2, other=0.0))[None, :]
    sin = to_float(tl.load(table + R // 2, mask=pair < R // 2, other=0.0))[None, :]
    head = tl.arange(0, HEADS)[:, None]
    used = (column < R)[None, :]
    if block == tl.num_programs(1) - 1:
        own_key = used & (head == 0)
        if cache is not None:
            own = row + tl.arange(0, 1)
            slot = tl.load(slots + own, mask=own < rows, other=-1).to(tl.int64)
            part = tl.arange(0, LATENT)
            kept = tl.load(latent + row * stride_lm + part, mask=part < L, other=0.0)
        x = k + row * stride_km + column[None, :] + 0 * head
        key = _rotate(x, own_key, cos, sin, HEADS, PAIRS)
        if cache is not None:
            place = cache + slot // S * stride_block + slot % S * stride_slot
            tl.store(place + part, kept, mask=(part < L) & (slot >= 0))
            x = place[:, None] + L + column[None, :] + 0 * head
            tl.store(x, key, mask=own_key & (slot >= 0)[:, None])
    else:
        head += block * HEADS
        x = q + row * stride_qm + head * stride_qh + NOPE + column[None, :]
        _rotate(x, used & (head < H), cos, sin, HEADS, PAIRS)


@launched
def launch(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor,
    latent: torch.Tensor | None, cache: torch.Tensor | None, slots: torch.Tensor | None,
) -> Launch:  # fmt: skip
    """Rotate q and k in place; write latent and k to slots of the cache, if there is one."""
    (M, H, D), R = q.shape, k.shape[1]
    heads = min(MOST_HEADS, triton.next_power_of_2(H))
    rows, S, L, strides = 0, 1, 1, (0, 0, 0)
    if latent is not None and cache is not None and slots is not None:
        rows, S, L = len(slots), cache.shape[1], latent.shape[1]
        strides = latent.stride(0), cache.stride(0), cache.stride(1)
    return Launch(
        _rotary_kernel, (M, triton.cdiv(H, heads) + 1),
        q, k, positions, cos_sin, latent, cache, slots, rows, H, S, L, q.stride(0), q.stride(1),
        k.stride(0), cos_sin.stride(0), *strides,
        NOPE=D - R, R=R, HEADS=heads, PAIRS=triton.next_power_of_2(R // 2),
        LATENT=triton.next_power_of_2(L), num_warps=4,
        **dependent_launch(q.device), **NO_FMA,
    )  # fmt: skip
