"""The weight policy: what a tensor's scales are is read from the scales, never from a name.

    all 2^k                -> bytes
    all c * 2^k, one c     -> bytes and one float32 c per shard (DeepSeek-V3.1's o_proj)
    anything else          -> kept as float32 | requantized | refused, as `non_pow2` says

Nothing here maps a float scale to a byte without proving it exact, except `requantize`, which
rewrites the weight's codes along with it and runs only when asked for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import torch

from ..codec import convert_scale_from_ue8m0, convert_scale_to_ue8m0, factor_scales, scale_to_float
from ..formats import FP8_NAN_CODE, QuantSpec
from ..layouts import expand, refine, used_blocks


@dataclass
class Encoded:
    """A weight ready to serve: w * sf (* c) are the values of the checkpoint.

    sf is uint8 in [1, 254] or float32 (kept); c is [..., grid rows] float32 or None for all 1.
    """

    w: torch.Tensor
    sf: torch.Tensor
    c: torch.Tensor | None
    kind: str  # "bytes" | "bytes and c" | "float32 kept" | "requantized"


@dataclass
class LoadReport:
    """Counts what each quantized layer became; `line` is the log's summary."""

    created: int = 0
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    finer: int = 0

    def add(self, layer_kind: str, kind: str, finer: bool) -> bool:
        """Count one processed layer; True once every created layer has been counted."""
        self.kinds[layer_kind, kind] += 1
        self.finer += finer
        return sum(self.kinds.values()) == self.created

    def line(self, spec: QuantSpec, backend: str) -> str:
        parts = []
        for layer_kind in ("linear", "experts"):
            counts = [f"{n} {k}" for (lk, k), n in sorted(self.kinds.items()) if lk == layer_kind]
            if counts:
                parts.append(f"{layer_kind} layers ({backend} backend): {', '.join(counts)}")
        if self.finer:
            parts.append(f"{self.finer} with scale grids finer than 128 (a shard cuts a block)")
        return (
            f"ue8m0: activation scales {spec.activation_scale}; weight scales: {'; '.join(parts)}"
        )


def decode_loaded_scale(
    loaded: torch.Tensor, gran: tuple[int, int], block: tuple[int, int], where: str
) -> torch.Tensor:
    """A scale tensor as read from a checkpoint -> float32 on the layer's (finer) grid.

    float32, bfloat16, e8m0 and uint8 are read by value. Raises ValueError, naming `where`, for a
    dtype or shape that cannot be a block scale and for NaN (byte 255), Inf and negative scales;
    zero is judged later, together with the weights of its block.
    """
    if loaded.dim() not in (2, 3):
        raise ValueError(
            f"{where}: the weight scale has shape {tuple(loaded.shape)}; allowed: one scale per "
            f"{block[0]}x{block[1]} block, [ceil(N/{block[0]}), ceil(K/{block[1]})]. Per-tensor "
            "and per-channel scales are not block FP8."
        )
    try:
        scale = scale_to_float(loaded)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _require(~scale.isnan(), scale, where, "NaN (byte 255 in a byte container)")
    _require(~scale.isinf(), scale, where, "infinite")
    _require(scale >= 0, scale, where, "negative")
    return refine(refine(scale, -2, gran[0], block[0]), -1, gran[1], block[1])


def _require(good: torch.Tensor, scale: torch.Tensor, where: str, what: str) -> None:
    if bool(good.all()):
        return
    index = tuple((~good).nonzero()[0].tolist())
    raise ValueError(
        f"{where}: the weight scale of block {index} is {what} ({float(scale[index])}); every "
        "scale has to be a positive finite number. The checkpoint is damaged: fetch it again."
    )


def encode(
    w: torch.Tensor,
    scale: torch.Tensor,
    segments: list[int],
    gran: tuple[int, int],
    non_pow2: str,
    where: str,
) -> Encoded:
    """Apply the policy to w [..., N, K] e4m3 with float32 scale [..., rows, columns].

    segments: grid rows of each logical shard of a fused layer (summing to rows); c belongs to
    one shard of one expert. Raises ValueError, naming `where`, for scales or codes that were
    never loaded, for non_pow2 == "error", and for scales of non-zero blocks that are zero or below
    2^-126 (code 0 is 2^-127), which kernels that flush subnormals would take for zero.
    """
    if scale.isnan().any():
        raise ValueError(
            f"{where}: no weight scale was loaded for at least one FP8 weight. The checkpoint "
            "lacks its `weight_scale_inv`, or a shard file is missing: fetch it again."
        )
    if ((w.view(torch.uint8) & FP8_NAN_CODE) == FP8_NAN_CODE).any():
        raise ValueError(
            f"{where}: the FP8 weight holds NaN codes, or was not in the checkpoint at all (a "
            "shard file is missing?). Fetch the checkpoint again."
        )
    valid = None
    zero = scale < torch.finfo(torch.float32).tiny
    if zero.any():
        used = used_blocks(w, gran)
        if (zero & used).any():
            index = tuple((zero & used).nonzero()[0].tolist())
            found = "zero" if scale[index] == 0 else "below 2^-126 (code 0)"
            raise ValueError(
                f"{where}: the weight scale of block {index} is {found}, but the block's weights "
                "are not zero. The checkpoint is damaged: fetch it again."
            )
        valid = ~zero
    lead = scale.shape[:-2]
    sf, c, exact = torch.empty_like(scale, dtype=torch.uint8), [], []
    start = 0
    for rows in segments:
        part = scale[..., start : start + rows, :]
        mask = None if valid is None else valid[..., start : start + rows, :].flatten(-2)
        part_sf, part_c, part_exact = factor_scales(
            part.flatten(-2).reshape(-1, rows * scale.shape[-1]),
            None if mask is None else mask.reshape(-1, rows * scale.shape[-1]),
        )
        sf[..., start : start + rows, :] = part_sf.reshape(part.shape)
        c.append(part_c.reshape(*lead, 1).expand(*lead, rows))
        exact.append(part_exact)
        start += rows
    if bool(torch.cat(exact).all()):
        factors = torch.cat(c, dim=-1).contiguous()
        if bool((factors == 1).all()):
            return Encoded(w, sf, None, "bytes")
        return Encoded(w, sf, factors, "bytes and c")
    if non_pow2 == "requant":
        return requantize(w, torch.where(zero, 1.0, scale), gran)
    if non_pow2 == "error":
        raise ValueError(
            f"{where}: its weight scales are neither 2^k nor c * 2^k, and non_pow2 is 'error'. "
            "Allowed: 'keep' serves them exactly as float32 scales, 'requant' rounds the weights "
            "anew (about 2.6 % relative error)."
        )
    return Encoded(w, torch.where(zero, 1.0, scale), None, "float32 kept")


def uniform(done: Encoded, spec: QuantSpec, where: str) -> Encoded:
    """The same values in tensors whose number and dtypes follow from `spec`, not from the scales.

    vLLM's expert load balancer (EPLB) moves experts between ranks, and all layers through one
    buffer that is made for the first layer's tensors: a layer with a c, or with float32 scales,
    beside one without would be moved wrongly, without a word. Bytes and c where the checkpoint
    declares UE8M0 or the policy leaves nothing else, float32 scales otherwise. Raises ValueError,
    naming `where`, for scales that are not what the checkpoint declares.
    """
    found = convert(done, spec.scale_fmt == "ue8m0" or spec.non_pow2 != "keep", with_c=True)
    if found is None:
        raise ValueError(
            f"{where}: its weight scales are neither 2^k nor c * 2^k, though the checkpoint "
            "declares scale_fmt ue8m0, and --enable-eplb needs scales of one kind in all layers. "
            "Allowed: serving without --enable-eplb, or non_pow2 'requant', which rounds the "
            "weights anew (about 2.6 % relative error)."
        )
    return found


def like_served(done: Encoded, as_bytes: bool, with_c: bool, where: str) -> Encoded:
    """The same values in tensors like those of the weights served so far (`convert`'s arguments).

    vLLM's reload copies what was loaded anew into the tensors that serve, whose addresses CUDA
    graphs have: by value, whatever the dtypes, and only into tensors that are there. Raises
    ValueError, naming `where`, for scales that those tensors cannot hold.
    """
    found = convert(done, as_bytes, with_c)
    if found is None:
        what = "neither 2^k nor c * 2^k" if done.c is None else "c * 2^k with c other than 1"
        allowed = "2^k or c * 2^k" if with_c else "2^k"
        raise ValueError(
            f"{where}: the weight scales to reload are {what}; allowed: {allowed}, as of the "
            "weights that this server started with and has room for. Restart it with the new "
            "weights: what is loaded now is incomplete, and vLLM cannot resume a reload."
        )
    return found


def convert(done: Encoded, as_bytes: bool, with_c: bool) -> Encoded | None:
    """The same values with scales as bytes, and a c if with_c, or as float32; None if impossible.

    Exact: c * 2^k was a float32 scale before it was split.
    """
    if not as_bytes:
        if done.sf.dtype == torch.float32:
            return done
        scale = convert_scale_from_ue8m0(done.sf)
        scale = scale if done.c is None else scale * done.c[..., None]
        return Encoded(done.w, scale, None, "float32 kept")
    if done.sf.dtype == torch.float32 or (done.c is not None and not with_c):
        return None
    if with_c and done.c is None:
        return replace(done, c=torch.ones(done.sf.shape[:-1], device=done.sf.device))
    return done


def requantize(w: torch.Tensor, scale: torch.Tensor, gran: tuple[int, int]) -> Encoded:
    """Round weights anew for power-of-two scales, the smallest not below the given ones.

    The new scale depends on the old one alone, not on the shard's other weights, so every
    tensor-parallel size serves the same values.
    """
    sf = convert_scale_to_ue8m0(scale).clamp(min=1)
    ratio = scale / convert_scale_from_ue8m0(sf)  # in (0.5, 1]: no code can overflow
    codes = w.clone()
    matrices = (t.view(-1, *t.shape[-2:]) for t in (w, codes, ratio))
    for old, new, factor in zip(*matrices, strict=True):
        new.copy_(
            (old.to(torch.float32) * expand(factor, old.shape[0], old.shape[1], gran)).to(w.dtype)
        )
    return Encoded(codes, sf, None, "requantized")
