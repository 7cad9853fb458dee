"""Where sums of experts go: gate and up to codes, products to rows, slots to a token."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from .expert_load import local_expert
from .hopper import barrier, quantize, silu_mul, stored_scale


@gluon.jit
def store_gated(
    gate, up, c, out, out_s, partial, counters, expert, row, end, scale_row, n, spot,
    split, N, stride_os,
    BLOCK_N: gl.constexpr, TOKENS: gl.constexpr, SPLITS: gl.constexpr, UE8M0: gl.constexpr,
    FLOOR: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """gate and up [128, TOKENS] of a part -> codes and scales, by the last part to come here."""
    last = True
    if SPLITS > 1:  # of one token, which is the first
        i = gl.arange(0, BLOCK_N, gl.SliceLayout(1, mma))
        first = gl.expand_dims(gl.arange(0, TOKENS, gl.SliceLayout(0, mma)), 0) == 0
        parts = partial + spot.to(gl.int64) * (2 * SPLITS * BLOCK_N) + i
        part = parts + split * (2 * BLOCK_N)
        gl.store(part, gl.sum(gl.where(first, gate, 0.0), 1))
        gl.store(part + BLOCK_N, gl.sum(gl.where(first, up, 0.0), 1))
        barrier()
        last = gl.atomic_add(counters + spot, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            gl.store(counters + spot, 0)
            gate_sum = gl.load(parts)
            up_sum = gl.load(parts + BLOCK_N)
            for s in gl.static_range(1, SPLITS):
                gate_sum += gl.load(parts + s * 2 * BLOCK_N)
                up_sum += gl.load(parts + s * 2 * BLOCK_N + BLOCK_N)
            gate = gl.expand_dims(gate_sum, 1).broadcast_to(gate.shape)
            up = gl.expand_dims(up_sum, 1).broadcast_to(up.shape)
    if last:
        if c is not None:
            factors = c + expert * (N // 128) + n
            gate *= gl.load(factors)
            up *= gl.load(factors + N // 256)
        layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
        hidden = gl.convert_layout(silu_mul(gate, up, DTYPE).permute((1, 0)), layout)
        code, scale = quantize(hidden, UE8M0, FLOOR)
        index = gl.arange(0, TOKENS, gl.SliceLayout(1, layout))
        target = row + index
        scales = out_s + n.to(gl.int64) * stride_os + scale_row + index
        gl.store(scales, stored_scale(scale, UE8M0), mask=target < end)
        column = n * 128 + gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, layout)), 0)
        target = gl.expand_dims(target, 1)
        spots = out + target.to(gl.int64) * (N // 2) + column
        gl.store(spots, code.to(gl.uint8, bitcast=True), mask=(target < end) & (column < N // 2))


@gluon.jit
def store_hidden(
    gate, up, out, out_s, row, scale_row, end, n, N, stride_os,
    UE8M0: gl.constexpr, FLOOR: gl.constexpr, DTYPE: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """gate and up [64, 128] -> codes of rows row to end, and scales from scale_row on."""
    rows: gl.constexpr = gl.SliceLayout(1, mma)
    code, scale = quantize(silu_mul(gate, up, DTYPE), UE8M0, FLOOR)
    i = gl.arange(0, 64, rows)
    target = out_s + n.to(gl.int64) * stride_os + (scale_row + i)
    gl.store(target, stored_scale(scale, UE8M0), mask=row + i < end)
    code = code.to(gl.uint8, bitcast=True)
    store_tile(code, out, None, None, row, end, n * 128, N // 2, mma, 16)


@gluon.jit
def store_tile(
    value, out, order, slot_weights, row, end, column, N, mma: gl.constexpr, WIDE: gl.constexpr
):  # fmt: skip
    """value [64, 128] -> out from column on: rows row to end, or their slots.

    WIDE: elements a thread stores at a time.
    """
    if slot_weights is not None:
        source = row + gl.arange(0, 64, gl.SliceLayout(1, mma))
        slot = gl.load(order + source, mask=source < end, other=0)
        weight = gl.load(slot_weights + slot, mask=source < end, other=0.0).to(gl.float32)
        value *= gl.expand_dims(weight, 1)
    wide: gl.constexpr = gl.BlockedLayout([1, WIDE], [WIDE // 4, 128 // WIDE], [4, 1], [1, 0])
    value = gl.convert_layout(value.to(out.dtype.element_ty), wide)
    target = row + gl.arange(0, 64, gl.SliceLayout(1, wide))
    used = gl.expand_dims(target < end, 1)
    if order is not None:
        target = gl.load(order + target, mask=target < end, other=0)
    columns = gl.expand_dims(column + gl.arange(0, 128, gl.SliceLayout(0, wide)), 0)
    target = gl.expand_dims(target.to(gl.int64), 1) * N + columns
    gl.store(out + target, value, mask=used & (columns < N))


@gluon.constexpr_function
def column_layout(BLOCK_N, WARPS):
    """In which a thread stores 16 bytes of a row, of columns [BLOCK_N] by rows."""
    return gl.BlockedLayout([8, 1], [8, 4], [BLOCK_N // 64, WARPS * 64 // BLOCK_N], [0, 1])


@gluon.jit
def store_columns(
    acc, c, out, order, slot_weights, expert, row, end, n, N,
    BLOCK_N: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, TOKENS] -> columns of out's rows row to end, or of their slots, weighted."""
    layout: gl.constexpr = column_layout(BLOCK_N, WARPS)
    target = row + gl.arange(0, TOKENS, gl.SliceLayout(0, layout))
    used = target < end
    if order is not None:
        target = gl.load(order + target, mask=used, other=0)
    weight = None
    if slot_weights is not None:
        weight = gl.load(slot_weights + target, mask=used, other=0.0).to(gl.float32)
    store_weighted(acc, c, out, weight, expert, target, used, n, N, BLOCK_N, WARPS)


@gluon.jit
def store_weighted(
    acc, c, out, weight, expert, target, used, n, N, BLOCK_N: gl.constexpr, WARPS: gl.constexpr
):
    """acc [BLOCK_N, TOKENS] -> columns of out's rows `target` where `used`, times `weight`."""
    layout: gl.constexpr = column_layout(BLOCK_N, WARPS)
    value = gl.convert_layout(acc, layout)
    column = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
    if c is not None:
        factors = c + expert * ((N + 127) // 128) + column // 128
        value *= gl.expand_dims(gl.load(factors, mask=column < N, other=0.0), 1)
    if weight is not None:
        value *= gl.expand_dims(weight, 0)
    column = gl.expand_dims(column, 1)
    spots = out + gl.expand_dims(target.to(gl.int64), 0) * N + column
    value = value.to(out.dtype.element_ty)
    gl.store(spots, value, mask=gl.expand_dims(used, 0) & (column < N))


@gluon.jit
def sum_slots(
    products, ids, expert_map, combined, counter, n, num_experts, num_global, N,
    BLOCK_N: gl.constexpr, TOPK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The sum of TOPK products of a column tile, by the last program to come here."""
    barrier()
    if gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == TOPK - 1:
        gl.store(counter, 0)
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        column = n * BLOCK_N + gl.arange(0, BLOCK_N, layout)
        total = gl.zeros([BLOCK_N], gl.float32, layout)
        for k in gl.static_range(TOPK):
            expert = local_expert(ids + k, expert_map, num_experts, num_global)
            used = (expert >= 0) & (column < N)
            total += gl.load(products + k * N + column, mask=used, other=0.0).to(gl.float32)
        gl.store(combined + column, total.to(combined.dtype.element_ty), mask=column < N)
