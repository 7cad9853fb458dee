"""What `convert` does to one tensor: copy, quantize, keep, dequantize, requantize.

A step knows the output tensors' dtypes and shapes from the source's headers. Its work comes in
pieces, some rows of blocks each, which need nothing of one another: they may run in any order and
at the same time, and no step needs memory for a whole large tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from ..codec import convert_scale_from_ue8m0, exact_ue8m0, scale_to_float
from ..formats import BLOCK
from ..layouts import ceil_div, grid_shape, used_blocks
from ..reference import dequantize, weight_dequant
from .quantize import quantize_blocks
from .scales import refuse_nan
from .shards import Checkpoint, CheckpointError, read_bytes
from .writer import Layout, ShardWriter, as_bytes, num_bytes

SCALE_DTYPES = {"float32": "F32", "uint8": "U8", "float8_e8m0fnu": "F8_E8M0"}
# 1 Mi elements: 2 MiB of bf16, so that the passes over a piece stay in a core's cache.
_CHUNK_ELEMENTS = 1 << 20
_COPY_BYTES = 1 << 22

Piece = Callable[[ShardWriter], int]  # writes its part, returns the source bytes it has done


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

    @property
    def memory(self) -> int:
        """Bytes that one piece needs at a time, at most."""
        return _COPY_BYTES

    def pieces(self) -> Iterator[Piece]:
        info = self.source.tensors[self.name]
        for offset in range(0, info.end - info.start, _COPY_BYTES):
            yield partial(self._run, offset)

    def _run(self, offset: int, shard: ShardWriter) -> int:
        info = self.source.tensors[self.name]
        data = read_bytes(info, offset, min(_COPY_BYTES, info.end - info.start - offset))
        shard.write(self.name, data, offset)
        return len(data)


@dataclass(frozen=True)
class _Blocks:
    """A weight [N, K] and its scales, in chunks of rows."""

    name: str
    source: Checkpoint

    # Bytes of working memory for each element of a chunk, all temporaries counted.
    _bytes_per_element = 0

    @property
    def scale_name(self) -> str:
        """The output's: the one that every loader knows, whatever the source calls its own."""
        return self.name.removesuffix(".weight") + ".weight_scale_inv"

    @property
    def shape(self) -> tuple[int, int]:
        N, K = self.source.tensors[self.name].shape
        return N, K

    @property
    def memory(self) -> int:
        N, K = self.shape
        rows = next((stop for _, stop in row_chunks(N, K)), 0)
        # The quantizers pad the last block.
        return ceil_div(rows, BLOCK) * ceil_div(K, BLOCK) * BLOCK**2 * self._bytes_per_element

    def pieces(self) -> Iterator[Piece]:
        for start, stop in row_chunks(*self.shape):
            yield partial(self._run, start, stop)

    def _run(self, start: int, stop: int, shard: ShardWriter) -> int:
        raise NotImplementedError

    def _codes_layout(self, scale_dtype: str) -> Layout:
        scale = SCALE_DTYPES[scale_dtype], grid_shape(*self.shape, (BLOCK, BLOCK))
        return {self.name: ("F8_E4M3", self.shape), self.scale_name: scale}

    def _write(
        self, shard: ShardWriter, start: int, codes: torch.Tensor, scale: torch.Tensor
    ) -> None:
        shard.write(self.name, as_bytes(codes), start * codes.shape[1])
        row = scale.shape[1] * scale.itemsize
        shard.write(self.scale_name, as_bytes(scale), start // BLOCK * row)


@dataclass(frozen=True)
class Quantize(_Blocks):
    """A float weight -> e4m3 codes, and UE8M0 scales or float32 amax / 448."""

    scale_dtype: str
    ue8m0: bool = True

    _bytes_per_element = 24

    @property
    def layout(self) -> Layout:
        return self._codes_layout(self.scale_dtype)

    def _run(self, start: int, stop: int, shard: ShardWriter) -> int:
        w = self.source.load(self.name, start, stop)
        try:
            codes, scale = quantize_blocks(w, self.ue8m0)
        except ValueError:
            raise CheckpointError(
                f"{self.name} holds NaN or Inf between rows {start} and {stop - 1}: the "
                "source is damaged. Fetch it again, or leave the tensor out with --ignore."
            ) from None
        scale = encode_scale(scale, self.scale_dtype) if self.ue8m0 else scale
        self._write(shard, start, codes, scale)
        return w.nbytes


@dataclass(frozen=True)
class _Fp8(_Blocks):
    """A block FP8 weight whose scales have been checked."""

    source_scale: str

    def _load(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, and scales as stored."""
        codes = self.source.load(self.name, start, stop)
        refuse_nan(self.name, codes)
        return codes, self.source.load(self.source_scale, start // BLOCK, ceil_div(stop, BLOCK))


@dataclass(frozen=True)
class KeepExact(_Fp8):
    """Scales 2^k: the codes, and the same scales as asked for."""

    scale_dtype: str

    _bytes_per_element = 5

    @property
    def layout(self) -> Layout:
        return self._codes_layout(self.scale_dtype)

    def _run(self, start: int, stop: int, shard: ShardWriter) -> int:
        codes, stored = self._load(start, stop)
        scale = scale_to_float(stored)
        tiny = scale < torch.finfo(torch.float32).tiny
        used = used_blocks(codes, (BLOCK, BLOCK)) | ~tiny if bool(tiny.any()) else None
        sf = exact_ue8m0(scale, used).sf
        assert sf is not None, f"{self.source_scale} was classified as powers of two"
        self._write(shard, start, codes, encode_scale(sf, self.scale_dtype))
        return codes.nbytes


@dataclass(frozen=True)
class KeepScales(_Fp8):
    """Any scales: the codes, and the scales as float32, a float32 scale byte for byte."""

    _bytes_per_element = 5

    @property
    def layout(self) -> Layout:
        return self._codes_layout("float32")

    def _run(self, start: int, stop: int, shard: ShardWriter) -> int:
        codes, stored = self._load(start, stop)
        self._write(shard, start, codes, scale_to_float(stored))
        return codes.nbytes


@dataclass(frozen=True)
class Dequantize(_Fp8):
    """A block FP8 weight -> bf16: code * scale in float32, rounded once."""

    _bytes_per_element = 20

    @property
    def layout(self) -> Layout:
        return {self.name: ("BF16", self.shape)}

    def _run(self, start: int, stop: int, shard: ShardWriter) -> int:
        codes, stored = self._load(start, stop)
        values = weight_dequant(codes, scale_to_float(stored))
        shard.write(self.name, as_bytes(values), start * codes.shape[1] * 2)
        return codes.nbytes


@dataclass(frozen=True)
class Requantize(_Fp8):
    """Arbitrary scales: the weight's float32 values quantized anew with UE8M0 scales."""

    scale_dtype: str
    # Of each piece done: first row, sum of squared errors, sum of squared values.
    squares: list[tuple[int, float, float]] = field(default_factory=list)

    _bytes_per_element = 40

    @property
    def layout(self) -> Layout:
        return self._codes_layout(self.scale_dtype)

    @property
    def relative_error(self) -> float:
        """||new - old|| / ||old|| of the whole weight, when all pieces are done."""
        parts = sorted(self.squares)  # the same sum in whatever order they were done
        old = sum(part[2] for part in parts)
        return float((sum(part[1] for part in parts) / old) ** 0.5) if old else 0.0

    def _run(self, start: int, stop: int, shard: ShardWriter) -> int:
        codes, stored = self._load(start, stop)
        gran = (BLOCK, BLOCK)
        old = dequantize(codes, scale_to_float(stored), gran)
        try:
            new, sf = quantize_blocks(old, ue8m0=True)
        except ValueError:
            raise CheckpointError(
                f"{self.source_scale}: with the scales between rows {start // BLOCK} and "
                f"{(stop - 1) // BLOCK}, weights overflow float32. The source is damaged."
            ) from None
        # Squares of very small and very large weights leave float32's range, not float64's.
        difference = (dequantize(new, sf, gran) - old).view(-1).double()
        values = old.view(-1).double()
        self.squares.append((start, float(difference.dot(difference)), float(values.dot(values))))
        # Last: whoever sees the last byte of a shard written reads the squares of all its pieces.
        self._write(shard, start, new, encode_scale(sf, self.scale_dtype))
        return codes.nbytes


Step = Copy | Quantize | KeepExact | KeepScales | Dequantize | Requantize


def source_bytes(steps: list[Step]) -> int:
    """Bytes of the source's tensors that the steps read, scales not counted."""
    infos = (step.source.tensors[step.name] for step in steps)
    return sum(info.end - info.start for info in infos)


def output_bytes(steps: list[Step]) -> int:
    """Bytes of the tensors that the steps write."""
    return sum(num_bytes(*tensor) for step in steps for tensor in step.layout.values())
