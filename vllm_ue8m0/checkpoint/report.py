"""What `inspect` found: one Tensor per weight, and a Report with sums, as Python and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..formats import QuantSpec
from .check import Problem
from .serving import Grid
from .shards import TensorInfo
from .stats import BYTE_DTYPES, ScaleStats

NO_CUTS: Mapping[int, Grid] = {}


class Tensor(NamedTuple):
    """One tensor that is not a scale.

    kind    "pow2" | "factored" | "arbitrary" | "unquantized"; None: quantized, but without scales
            that could be read
    served  "bytes" | "bytes and c" | "float32 kept" | "requantized" | "unquantized" | "refused"
    cuts    tensor-parallel size -> (rows, columns) per scale or a refusal, where not 128x128
    """

    name: str
    info: TensorInfo
    kind: str | None
    served: str
    scale: str | None = None
    scale_info: TensorInfo | None = None
    stats: ScaleStats | None = None
    cuts: Mapping[int, Grid] = NO_CUTS

    @property
    def scale_elsewhere(self) -> bool:
        """Whether the scale lies in another shard than the weight."""
        return self.scale_info is not None and self.scale_info.file != self.info.file

    def to_json(self) -> dict[str, Any]:
        """The tensor as `inspect --json` prints it."""
        info, stats, scale = self.info, self.stats, self.scale_info
        out: dict[str, Any] = {
            "name": self.name,
            "class": self.kind,
            "c": stats.c if stats else None,
            "min_exponent": min(stats.exponents, default=None) if stats else None,
            "max_exponent": max(stats.exponents, default=None) if stats else None,
            "served": self.served,
            "dtype": info.dtype,
            "shape": list(info.shape),
        }
        if scale is not None:
            out |= {"scale": self.scale, "scale_dtype": scale.dtype}
            out |= {"scale_shape": list(scale.shape), "scale_in_other_shard": self.scale_elsewhere}
        if stats is not None:
            in_bytes = scale is not None and scale.dtype in BYTE_DTYPES
            out |= {
                "scales": stats.num_scales,
                "exponents": {str(k): n for k, n in sorted(stats.exponents.items())},
                "code_0": stats.subnormal if in_bytes else 0,
                "code_255": stats.nan if in_bytes else 0,
                "zero": stats.zero,
                "negative": stats.negative,
                "infinite": stats.inf,
                "nan": stats.nan,
            }
        if self.cuts:
            out["tensor_parallel"] = {str(size): grid for size, grid in self.cuts.items()}
        return out


@dataclass(frozen=True)
class Report:
    """What `inspect` found. servable: `--quantization ue8m0` takes it, as far as can be seen.

    Weights are not read, so NaN codes in them are not seen.
    """

    path: str
    servable: bool
    tensors: list[Tensor]
    problems: list[Problem]
    spec: QuantSpec | None  # None if the config is refused

    def exponents(self, kind: str | None = None) -> Counter[int]:
        """Scales by exponent k of 2^k, of all tensors or of one class."""
        total: Counter[int] = Counter()
        for tensor in self.tensors:
            if tensor.stats is not None and kind in (None, tensor.kind):
                total.update(tensor.stats.exponents)
        return total

    def total(self) -> dict[str, Any]:
        """Sums over all tensors."""
        scaled = [(t, t.stats) for t in self.tensors if t.stats is not None]
        return {
            "tensors": len(self.tensors),
            "scales": sum(stats.num_scales for _, stats in scaled),
            "classes": dict(Counter(t.kind or "unreadable" for t in self.tensors)),
            "served": dict(Counter(t.served for t in self.tensors)),
            "scale_dtypes": dict(Counter(t.scale_info.dtype for t in self.tensors if t.scale_info)),
            "exponents": {str(k): n for k, n in sorted(self.exponents().items())},
            "code_0": sum(s.subnormal for t, s in scaled if _bytes(t)),
            "code_255": sum(s.nan for t, s in scaled if _bytes(t)),
            **{
                name: sum(getattr(stats, field) for _, stats in scaled)
                for name, field in (
                    ("zero", "zero"),
                    ("negative", "negative"),
                    ("infinite", "inf"),
                    ("nan", "nan"),
                )
            },
            "scales_in_other_shards": sum(t.scale_elsewhere for t in self.tensors),
        }

    def to_json(self) -> dict[str, Any]:
        """The report as `inspect --json` prints it."""
        return {
            "servable": self.servable,
            "path": self.path,
            "activation_scale": self.spec.activation_scale if self.spec else None,
            "problems": [problem._asdict() for problem in self.problems],
            "total": self.total(),
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }


def _bytes(tensor: Tensor) -> bool:
    return tensor.scale_info is not None and tensor.scale_info.dtype in BYTE_DTYPES
