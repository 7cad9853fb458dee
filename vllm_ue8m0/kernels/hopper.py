"""What the Gluon kernels for sm_90 share: Triton's changing names, launch order, quantization."""

from functools import cache

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import extern, inline_asm_elementwise

# The new name first: the copies have theirs since Triton 3.8, the old ones are stubs that raise
# since 3.9; the barrier since 3.7.
copy_to_shared = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_to_global = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

SF_NAN = gl.constexpr(255)
NAN_BITS = gl.constexpr(0x7FC00000)


@builtin
def reinterpret(smem, dtype, shape, layout, _semantic=None):
    """The same shared memory, seen otherwise; `_reinterpret` until Triton 3.8."""
    method = getattr(smem, "reinterpret", None) or smem._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


@extern
def wait_for_inputs(_semantic=None):
    """Wait for the end of the kernels before this one; see tile.wait_for_inputs."""
    inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1,
        _semantic=_semantic,
    )  # fmt: skip


@extern
def start_dependents(_semantic=None):
    """Let the next kernel start; it waits for this one's end before it reads.

    A kernel that writes weights must not call this: products load weights before they wait.
    """
    inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False,
        pack=1, _semantic=_semantic,
    )  # fmt: skip


@extern
def fence_async_global(_semantic=None):
    """Order ordinary accesses of global memory and the copy engine's, of this thread."""
    inline_asm_elementwise(
        "fence.proxy.async.global; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1,
        _semantic=_semantic,
    )  # fmt: skip


@extern
def take_turn(warpgroup, _semantic=None):
    """Wait until the other of two warpgroups, 0 and 1, has passed the turn.

    Named barriers 14 and 15: Triton numbers its own from 0, one for each partition.
    """
    inline_asm_elementwise(
        f"bar.sync {14 + warpgroup.value}, 256; // $0", "=r", [], dtype=gl.int32, is_pure=False,
        pack=1, _semantic=_semantic,
    )  # fmt: skip


@extern
def pass_turn(warpgroup, _semantic=None):
    """Let the other warpgroup take its turn."""
    inline_asm_elementwise(
        f"bar.arrive {15 - warpgroup.value}, 256; // $0", "=r", [], dtype=gl.int32, is_pure=False,
        pack=1, _semantic=_semantic,
    )  # fmt: skip


@gluon.jit
def next_stage(stage, phase, STEP: gl.constexpr, STAGES: gl.constexpr):
    """Of a ring, and the phase of its barriers."""
    stage += STEP
    wrap = stage == STAGES
    return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def float_scale(scale):
    """uint8 bytes -> float32, all 256 codes exactly; float32 passes through. As ue8m0.decode."""
    if scale.dtype == gl.uint8:
        code = scale.to(gl.int32)
        bits = gl.where(code == 0, 0x400000, code << 23)
        scale = gl.where(code == SF_NAN, NAN_BITS, bits).to(gl.float32, bitcast=True)
    return scale


@gluon.jit
def add_scaled_rows(raw, factor, acc):
    """acc + raw [ROWS, COLUMNS] * factor [ROWS], one FMA each."""
    return gl.fma(raw, gl.expand_dims(factor, 1).broadcast_to(raw.shape), acc)


@gluon.jit
def quantize(x, UE8M0: gl.constexpr, FLOOR: gl.constexpr):
    """float32 x [ROWS, 128] -> (e4m3 codes, float32 scales [ROWS]); the rules of ue8m0.quantize."""
    amax = gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    if UE8M0:
        sf = gl.maximum(((amax + 0x1FFFFF) >> 23) - 8, FLOOR)
        nan = amax >= 0x7F800000
        inverse = gl.where(nan, NAN_BITS, (254 - sf) << 23).to(gl.float32, bitcast=True)
        codes = x * gl.expand_dims(inverse, 1)
        scale = gl.where(nan, NAN_BITS, sf << 23).to(gl.float32, bitcast=True)
    else:
        amax = gl.maximum(amax, 0x38D1B717).to(gl.float32, bitcast=True)  # float32(1e-4)
        scale = gl.div_rn(amax, gl.full_like(amax, 448.0))
        codes = _divide(x, gl.expand_dims(scale, 1))
    return codes.to(gl.float8e4nv), scale


@gluon.jit
def stored_scale(scale, UE8M0: gl.constexpr):
    """Scales that `quantize` gave, as bytes or as they are."""
    if UE8M0:
        scale = (scale.to(gl.int32, bitcast=True) >> 23).to(gl.uint8)
    return scale


@gluon.jit
def silu_mul(gate, up, DTYPE: gl.constexpr):
    """silu(gate) * up of float32 sums, rounded where silu_mul_quant and its DTYPE input are."""
    gate = gate.to(DTYPE).to(gl.float32)
    silu = (gate / (1.0 + gl.exp(-gate))).to(DTYPE).to(gl.float32)
    return (silu * up.to(DTYPE).to(gl.float32)).to(DTYPE).to(gl.float32)


@gluon.jit
def _divide(x, scale):
    """x [ROWS, 128] / scale [ROWS, 1], correctly rounded: ue8m0.divide, which has the reasons."""
    one = gl.full_like(scale, 1.0)
    inverse = gl.div_rn(one, scale).broadcast_to(x.shape)
    negated = gl.div_rn(-one, scale).broadcast_to(x.shape)
    scale = gl.where(scale == float("inf"), 0.0, scale).broadcast_to(x.shape)
    quotient = x * inverse
    quotient = gl.fma(gl.fma(quotient, scale, -x), negated, quotient)
    return gl.fma(gl.fma(quotient, scale, -x), negated, quotient)


@gluon.jit
def add_parts(value, parts, counter, split, SPLITS: gl.constexpr, SIZE: gl.constexpr):
    """Sum of SPLITS partial tiles in order, for the last program to come: (is it last, sum).

    value: this program's part, for the SIZE elements at parts + split * SIZE. The counter is zero
    before and after.
    """
    gl.store(parts + split * SIZE, value)
    barrier()
    last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        gl.store(counter, 0)
        value = gl.load(parts)
        for s in gl.static_range(1, SPLITS):
            value += gl.load(parts + s * SIZE)
    return last, value


@gluon.jit
def _copy_out(value, out_desc, smem, row, column):
    tma.store_wait(0)  # the last store has read its shared memory
    smem.store(value)
    fence_async_shared()
    copy_to_global(out_desc, [row, column], smem)


@gluon.jit
def store_rows(acc, c, bias, out, out_desc, smem, row, column, M, N, mma: gl.constexpr):
    """acc [64, BLOCK_N] of layout mma, times c, plus bias -> out[row:, column:].

    By the copy engine through smem, if out_desc is not None: all columns or a half at a time.
    """
    BLOCK_N: gl.constexpr = acc.shape[1]
    columns = column + gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma))
    if c is not None:
        acc *= gl.load(c + column // 128)
    if bias is not None:
        loaded = gl.load(bias + columns, mask=columns < N, other=0.0).to(gl.float32)
        acc += gl.expand_dims(loaded, 0)
    value = acc.to(out.dtype.element_ty)
    if out_desc is not None:
        WIDTH: gl.constexpr = out_desc.block_type.shape[1]
        if WIDTH == BLOCK_N:
            _copy_out(value, out_desc, smem, row, column)
        else:
            left, right = value.reshape([64, 2, WIDTH]).permute((0, 2, 1)).split()
            _copy_out(left, out_desc, smem, row, column)
            _copy_out(right, out_desc, smem, row, column + WIDTH)
    else:
        rows = gl.expand_dims(row + gl.arange(0, 64, gl.SliceLayout(1, mma)), 1)
        columns = gl.expand_dims(columns, 0)
        gl.store(out + rows.to(gl.int64) * N + columns, value, mask=(rows < M) & (columns < N))


@cache
def _tile_layout(rows: int, columns: int, dtype: gl.dtype) -> gl.NVMMASharedLayout:
    """Kept: making one takes the host as long as a small kernel runs."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


@cache
def _line_layout(bits: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(0, bits, 2)


def code_tiles(codes: torch.Tensor, rows: int) -> TensorDescriptor:
    """Tiles of `rows` x 128 e4m3 codes, swizzled as wgmma reads them; zeros outside the matrix."""
    return TensorDescriptor.from_tensor(codes, [rows, 128], _tile_layout(rows, 128, gl.float8e4nv))


def half_tiles(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of `rows` x `columns` 16-bit numbers, swizzled as wgmma reads them and tma writes."""
    layout = _tile_layout(rows, columns, gl.bfloat16)
    return TensorDescriptor.from_tensor(x, [rows, columns], layout)


def scale_columns(scale: torch.Tensor, rows: int) -> TensorDescriptor:
    """Columns of `rows` of column-major scales [M, K/128]."""
    M, groups = scale.shape
    layout = _line_layout(8 * scale.element_size())
    return TensorDescriptor(scale, [groups, M], [scale.stride(1), 1], [1, rows], layout)


def column_major(scale: torch.Tensor) -> bool:
    """Whether scales [M, K/128] are columns aligned to 16 bytes, as "mn_major" of layouts.py."""
    pitch = scale.stride(1) * scale.element_size()
    return scale.stride(0) == 1 and pitch % 16 == 0 and scale.data_ptr() % 16 == 0
