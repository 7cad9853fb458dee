"""How one checkpoint would be served on this machine: `inspect`'s verdict, and which kernels."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..checkpoint.report import Tensor


@dataclass(frozen=True)
class Model:
    """served: tensors by what becomes of them. linears: backend -> linear weights it multiplies.

    refused: why the faster kernels do not take a weight -> how many weights, of one rank.
    problems: what keeps it from being served.
    """

    directory: str
    problems: list[str]
    activation_scale: str | None = None
    dtype: str | None = None
    served: dict[str, int] = field(default_factory=dict)
    linears: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)


def look_at(directory: str, device: str | None) -> Model:
    """Read a local checkpoint's headers and scales. device: what operators run on, if anything."""
    from ..checkpoint.inspect import inspect
    from ..checkpoint.shards import CheckpointError

    if not Path(directory).is_dir():
        return Model(
            directory,
            ["is not a directory. A model's name is not looked up: give the directory that its "
             "files were downloaded to."],
        )  # fmt: skip
    try:
        report = inspect(directory)
    except (CheckpointError, OSError) as error:
        return Model(directory, [str(error)])
    problems = [f"{problem.tensor} {problem.problem}" for problem in report.problems]
    linears, refused = _kernels(report.tensors, device) if report.servable and device else ({}, {})
    return Model(
        directory,
        problems,
        report.spec.activation_scale if report.spec else None,
        _dtype(Path(directory)),
        report.total()["served"],
        linears,
        refused,
    )


def _dtype(directory: Path) -> str | None:
    """The dtype that `--dtype auto` takes from config.json."""
    file = directory / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    dtype = config.get("dtype", config.get("torch_dtype"))
    return dtype if isinstance(dtype, str) else None


def _kernels(tensors: list[Tensor], device: str) -> tuple[dict[str, int], dict[str, int]]:
    """Linear weights by backend, and the reasons of the backend that hands some to portable."""
    from .. import dispatch
    from ..checkpoint.serving import layer_of

    try:
        chosen = dispatch.choose("linear", device)
    except (RuntimeError, ValueError):
        return {}, {}
    backend = chosen.load()
    linears: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.kind in (None, "unquantized") or layer_of(tensor.name).kind.startswith("experts"):
            continue
        reason = _refusal(backend, tensor.info.shape, tensor.served)
        linears[chosen.name if reason is None else "portable"] += 1
        if reason is not None:
            refused[reason] += 1
    return dict(linears), dict(refused)


def _refusal(backend: ModuleType, shape: tuple[int, ...], served: str) -> str | None:
    """What a backend that has a `refusal` says of a weight [N, K] in 128x128 blocks, one rank."""
    if not hasattr(backend, "refusal"):
        return None
    import torch

    from ..formats import BLOCK
    from ..layouts import grid_shape

    N, K = shape
    gran = (BLOCK, BLOCK)
    sf_dtype = torch.float32 if served == "float32 kept" else torch.uint8
    reason: str | None = backend.refusal(
        torch.empty(1, K, dtype=torch.bfloat16, device="meta"),
        torch.empty(N, K, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(grid_shape(N, K, gran), dtype=sf_dtype, device="meta"),
        gran,
    )
    return reason
