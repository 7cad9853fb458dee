"""Fake quantization and rounding to bf16, with gradients straight through.

`fake_quant_weight` and `fake_quant_act` give, bit for bit, the values that are left by
vllm_ue8m0.reference.weight_quant and act_quant with ue8m0=True. They use no float8 type, so that
any compiler and device that keeps float32 arithmetic gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_ue8m0 import reference
from vllm_ue8m0.codec import quant_exponent
from vllm_ue8m0.formats import BLOCK, SF_FLOOR


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    """y, with the gradient of x; y + 0.0 changes no value."""
    return y + (x - x.detach()) if torch.is_grad_enabled() and x.requires_grad else y


def bf16(x: Tensor) -> Tensor:
    """Round float32 to bf16 values, nearest even; gradient straight through.

    On the bits, because compilers drop a cast to bf16 that is followed by a cast back.
    """
    bits = x.detach().view(torch.int32)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return straight_through(x, (bits & -0x10000).view(torch.float32))


def round_e4m3(x: Tensor) -> Tensor:
    """Nearest-even e4m3 values of |x| <= 448, by adding 1.5 * 2^23 quanta and taking them away."""
    exponent = ((x.view(torch.int32) >> 23) & 0xFF).clamp(min=127 - 6)
    magic = ((exponent + 20 << 23) | 0x400000).view(torch.float32)
    return torch.copysign((x + magic) - magic, x)


def _fake_quant(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:
    code = quant_exponent(blocks.abs().amax(dims, keepdim=True), SF_FLOOR)
    inverse, scale = ((254 - code) << 23).view(torch.float32), (code << 23).view(torch.float32)
    return round_e4m3(blocks * inverse) * scale


def fake_quant_weight(w: Tensor) -> Tensor:
    """[..., N, K] float32 -> its values after quantization in 128x128 blocks, cut at the edges."""
    N, K = w.shape[-2:]
    padded = F.pad(w, (0, -K % BLOCK, 0, -N % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    return _fake_quant(blocks, (-3, -1)).flatten(-2).flatten(-3, -2)[..., :N, :K]


def fake_quant_act(x: Tensor) -> Tensor:
    """[..., K] float32 -> its values after quantization in 1x128 groups; K is a multiple of 128."""
    return _fake_quant(x.unflatten(-1, (-1, BLOCK)), (-1,)).flatten(-2)


def activation_quantizer(activation_scale: str) -> Callable[[Tensor], Tensor]:
    """ "ue8m0" as trained, "fp32" (amax / 448, not rounded to a power of two) or "none"."""
    if activation_scale == "ue8m0":
        return lambda x: straight_through(x, fake_quant_act(x.detach()))
    if activation_scale not in ("fp32", "none"):
        raise ValueError(f"activation_scale is {activation_scale!r}; allowed: ue8m0, fp32, none")
    return lambda x: reference.fake_quant(x, BLOCK, activation_scale)
