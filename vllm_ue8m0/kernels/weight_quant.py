"""Weight quantization: w [N, K] float -> e4m3 codes, one scale per BLOCK x BLOCK block.

w unit stride along K; q [N, K] contiguous; s [ceil(N / BLOCK), ceil(K / BLOCK)] contiguous, uint8
or float32. Bit for bit reference.weight_quant: bytes at least 1, no amax floor; float32 scales
amax / 448, at least 2^-126, 1 for a block of zeros. A block with NaN or Inf shows it in its scale:
byte 255, or a non-finite float32.
"""

import torch
import triton
import triton.language as tl

from .config import FMA
from .ue8m0 import divide, encode_e4m3, quant_exponent, to_float


@triton.jit
def _weight_quant_kernel(w, q, s, N, K, columns, stride_wn, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    n = (block // columns).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]  # [BLOCK, 1]
    k = block % columns * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (n < N) & (k < K)
    values = to_float(tl.load(w + n * stride_wn + k, mask=mask, other=0.0))
    # As integers the magnitudes keep their order, with NaN above Inf.
    amax = tl.max(tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), axis=0)
    if s.dtype.element_ty == tl.uint8:
        sf = quant_exponent(amax, 1)
        codes = encode_e4m3(values * ((254 - sf) << 23).to(tl.float32, bitcast=True))
        tl.store(s + block, sf.to(tl.uint8))
    else:
        scale = tl.math.div_rn(amax.to(tl.float32, bitcast=True), 448.0)
        # Compared as bits: NaN stays, and amax / 448 of a subnormal would have lost bits.
        bits = tl.maximum(scale.to(tl.int32, bitcast=True), 0x00800000)
        scale = tl.where(amax == 0, 0x3F800000, bits).to(tl.float32, bitcast=True)
        # Where remainders of the division would be subnormal, both operands are moved up, exactly.
        unit = tl.where(scale < 2.0**-60, 2.0**64, 1.0)
        rows = tl.full([BLOCK], 1.0, tl.float32) * (scale * unit)
        codes = encode_e4m3(divide(values * unit, rows))
        tl.store(s + block, scale)
    tl.store(q + n * K + k, codes, mask=mask)


def launch(w: torch.Tensor, q: torch.Tensor, s: torch.Tensor, block: int, num_warps: int) -> None:
    """Quantize w into q and s; the dtype of s (uint8, float32) selects the kind of scale."""
    (N, K), columns = w.shape, s.shape[1]
    _weight_quant_kernel[(s.numel(),)](
        w, q.view(torch.uint8), s, N, K, columns, w.stride(0) if N > 1 else K,
        BLOCK=block, num_warps=num_warps, **FMA,
    )  # fmt: skip
