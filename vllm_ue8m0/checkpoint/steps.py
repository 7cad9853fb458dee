"""What `convert` does to one tensor: copy, quantize, keep exactly, dequantize.

A step knows the output tensors' dtypes and shapes from the source's headers, and writes them in
pieces of some rows of blocks, so that no step needs memory for a whole large tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..codec import (
    ScaleClass,
    convert_scale_from_ue8m0,
    exact_ue8m0,
    scale_to_float,
)
from ..formats import BLOCK, FP8_MAX, FP8_NAN_CODE
from ..layouts import ceil_div, grid_shape
from ..reference import weight_dequant, weight_quant
from .shards import Checkpoint, CheckpointError, read_bytes
from .writer import Layout, ShardWriter, as_bytes, num_bytes

SCALE_DTYPES = {"float32": "F32", "uint8": "U8", "float8_e8m0fnu": "F8_E8M0"}
# 2 Mi elements: 8 MiB in float32, about 24 MiB with the temporaries of weight_quant.
_CHUNK_ELEMENTS = 1 << 21
_COPY_BYTES = 1 << 24


def row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(start, stop) row ranges of whole blocks, a bounded number of elements each."""
    step = max(_CHUNK_ELEMENTS // max(columns, 1) // BLOCK, 1) * BLOCK
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def encode_scale(sf: torch.Tensor, scale_dtype: str) -> torch.Tensor:
    """uint8 scale bytes in the storage dtype asked for; the same numbers in each."""
    if scale_dtype == "float32":
        return convert_scale_from_ue8m0(sf)
    return sf if scale_dtype == "uint8" else sf.view(torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Copy:
    """The tensor as it is."""

    name: str
    source: Checkpoint

    @property
    def layout(self) -> Layout:
        info = self.source.tensors[self.name]
        return {self.name: (info.dtype, info.shape)}

    def run(self, shard: ShardWriter) -> Iterator[int]:
        """Write the outputs; yields the number of source bytes done after each piece."""
        info = self.source.tensors[self.name]
        size = info.end - info.start
        for offset in range(0, size, _COPY_BYTES):
            data = read_bytes(info, offset, min(_COPY_BYTES, size - offset))
            shard.write(self.name, data, offset)
            yield len(data)


@dataclass(frozen=True)
class Quantize:
    """A float weight [N, K] -> e4m3 codes and UE8M0 scales in weight_scale_inv."""

    name: str
    source: Checkpoint
    scale_dtype: str

    @property
    def scale_name(self) -> str:
        return self.name.removesuffix(".weight") + ".weight_scale_inv"

    @property
    def layout(self) -> Layout:
        N, K = self.source.tensors[self.name].shape
        scale = SCALE_DTYPES[self.scale_dtype], grid_shape(N, K, (BLOCK, BLOCK))
        return {self.name: ("F8_E4M3", (N, K)), self.scale_name: scale}

    def run(self, shard: ShardWriter) -> Iterator[int]:
        N, K = self.source.tensors[self.name].shape
        row_bytes = num_bytes(SCALE_DTYPES[self.scale_dtype], (ceil_div(K, BLOCK),))
        for start, stop in row_chunks(N, K):
            w = self.source.load(self.name, start, stop)
            try:
                codes, sf = weight_quant(w)
            except ValueError:
                raise CheckpointError(
                    f"{self.name} holds NaN or Inf between rows {start} and {stop - 1}: the "
                    "source is damaged. Fetch it again, or leave the tensor out with --ignore."
                ) from None
            shard.write(self.name, as_bytes(codes), start * K)
            scale = as_bytes(encode_scale(sf, self.scale_dtype))
            shard.write(self.scale_name, scale, start // BLOCK * row_bytes)
            yield w.nbytes


@dataclass(frozen=True)
class KeepExact:
    """A block FP8 weight whose scales are 2^k: its codes, and the same scales as asked for."""

    name: str
    source: Checkpoint
    scale_name: str
    scale_dtype: str

    @property
    def layout(self) -> Layout:
        codes, scale = self.source.tensors[self.name], self.source.tensors[self.scale_name]
        return {
            self.name: (codes.dtype, codes.shape),
            self.scale_name: (SCALE_DTYPES[self.scale_dtype], scale.shape),
        }

    def run(self, shard: ShardWriter) -> Iterator[int]:
        sf = exact_bytes(self.source, self.name, self.scale_name)
        shard.write(self.scale_name, as_bytes(encode_scale(sf, self.scale_dtype)))
        N, K = self.source.tensors[self.name].shape
        for start, stop in row_chunks(N, K):
            codes = self.source.load(self.name, start, stop)
            _refuse_nan(self.name, codes)
            shard.write(self.name, as_bytes(codes), start * K)
            yield codes.nbytes


@dataclass(frozen=True)
class Dequantize:
    """A block FP8 weight -> bf16: code * scale in float32, rounded once."""

    name: str
    source: Checkpoint
    scale_name: str

    @property
    def layout(self) -> Layout:
        return {self.name: ("BF16", self.source.tensors[self.name].shape)}

    def run(self, shard: ShardWriter) -> Iterator[int]:
        scale = load_scale(self.source, self.name, self.scale_name)[0]
        if bool((scale > torch.finfo(torch.bfloat16).max / FP8_MAX).any()):
            raise CheckpointError(
                f"{self.scale_name}: the largest scale is {float(scale.max()):g}; with it, weights "
                "overflow bf16. The source is damaged."
            )
        N, K = self.source.tensors[self.name].shape
        for start, stop in row_chunks(N, K):
            codes = self.source.load(self.name, start, stop)
            _refuse_nan(self.name, codes)
            values = weight_dequant(codes, scale[start // BLOCK : ceil_div(stop, BLOCK)])
            shard.write(self.name, as_bytes(values), start * K * 2)
            yield codes.nbytes


Step = Copy | Quantize | KeepExact | Dequantize


def _refuse_nan(name: str, codes: torch.Tensor) -> None:
    if bool((codes.view(torch.uint8) & FP8_NAN_CODE == FP8_NAN_CODE).any()):
        raise CheckpointError(f"{name} holds NaN codes: the source is damaged, fetch it again.")


def load_scale(
    source: Checkpoint, name: str, scale_name: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales as float32, and a mask (None: all) of those that matter.

    A scale of 0, or code 0, does not matter over a block of zeros. Raises CheckpointError for
    any other 0 and for negative, infinite and NaN scales.
    """
    scale = scale_to_float(source.load(scale_name))
    bad = ~scale.isfinite() | (scale < 0)
    used = None
    if bool((scale < torch.finfo(torch.float32).tiny).any()):
        used = _nonzero_blocks(source, name) | (scale >= torch.finfo(torch.float32).tiny)
        bad |= (scale == 0) & used
    if bool(bad.any()):
        row, column = (int(i) for i in bad.nonzero()[0])
        raise CheckpointError(
            f"{scale_name}: the scale of block [{row}, {column}] is {float(scale[row, column])} "
            f"({int(bad.sum())} such scales); a scale must be positive and finite. The weights of "
            "such a block are lost: fetch the checkpoint again."
        )
    return scale, used


def exact_bytes(source: Checkpoint, name: str, scale_name: str) -> torch.Tensor:
    """The uint8 codes of scales that are powers of two; raises CheckpointError for others."""
    scale, used = load_scale(source, name, scale_name)
    exact = exact_ue8m0(scale, used)
    if exact.kind is ScaleClass.POW2 and exact.sf is not None:
        return exact.sf
    found = "are not powers of two between 2^-126 and 2^127"
    if exact.kind is ScaleClass.FACTORED:
        found = f"are {exact.c} times powers of two, not powers of two"
    raise CheckpointError(
        f"{scale_name}: the scales {found}, and rounding them would change the weights. Serve the "
        "checkpoint as it is, or accept a second rounding: `convert --to bf16`, then convert that."
    )


def _nonzero_blocks(source: Checkpoint, name: str) -> torch.Tensor:
    """bool [ceil(N/128), ceil(K/128)]: whether the block holds a code other than +-0."""
    N, K = source.tensors[name].shape
    columns = ceil_div(K, BLOCK)
    parts = []
    for start, stop in row_chunks(N, K):
        rows = ceil_div(stop - start, BLOCK)
        codes = source.load(name, start, stop).view(torch.uint8) & 0x7F
        pad = (0, columns * BLOCK - K, 0, rows * BLOCK - (stop - start))
        blocks = torch.nn.functional.pad(codes, pad).view(rows, BLOCK, columns, BLOCK)
        parts.append(blocks.amax(3).amax(1) > 0)
    return torch.cat(parts)
