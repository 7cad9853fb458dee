"""How one checkpoint would be served on this machine: `inspect`'s verdict, and which kernels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..formats import BLOCK

if TYPE_CHECKING:
    import torch

    from ..checkpoint.report import Tensor

Counts = dict[str, int]
Refusal = Callable[[ModuleType], "str | None"]


@dataclass(frozen=True)
class Model:
    """served: tensors by what becomes of them. linears: backend -> linear weights it multiplies.

    experts: backend -> MoE layers whose routed experts it multiplies. refused, experts_refused: why
    the faster kernels do not take a weight, or a layer's experts -> how many, of one rank.
    problems: what keeps it from being served.
    """

    directory: str
    problems: list[str]
    activation_scale: str | None = None
    dtype: str | None = None
    served: Counts = field(default_factory=dict)
    linears: Counts = field(default_factory=dict)
    refused: Counts = field(default_factory=dict)
    experts: Counts = field(default_factory=dict)
    experts_refused: Counts = field(default_factory=dict)


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
    scale, dtype = report.spec.activation_scale if report.spec else None, _dtype(Path(directory))
    served = report.total()["served"]
    if not report.servable or device is None or scale is None:
        return Model(directory, problems, scale, dtype, served)
    linears, experts = _layers(report.tensors)
    x = dtype if dtype == "float32" else "bfloat16"
    return Model(
        directory,
        problems,
        scale,
        dtype,
        served,
        *_count("linear", device, [partial(_linear, w, x, scale) for w in linears]),
        *_count("experts", device, [partial(_experts, *ws, x, scale) for ws in experts]),
    )


def _dtype(directory: Path) -> str | None:
    """The dtype that `--dtype auto` takes from config.json."""
    file = directory / "config.json"
    config: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    dtype = config.get("dtype", config.get("torch_dtype"))
    return dtype if isinstance(dtype, str) else None


def _layers(tensors: list[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The quantized linear weights, and of each MoE layer one expert's gate (or up) and down."""
    from ..checkpoint.serving import layer_of

    linears: list[Tensor] = []
    experts: dict[str, dict[str, Tensor]] = {}
    for tensor in tensors:
        if tensor.kind in (None, "unquantized"):
            continue
        layer = layer_of(tensor.name)
        if layer.kind.startswith("experts"):
            name, _, part = layer.name.rpartition(".")
            experts.setdefault(name, {}).setdefault(part, tensor)
        else:
            linears.append(tensor)
    return linears, [(parts["w13"], parts["w2"]) for parts in experts.values() if len(parts) == 2]


def _count(op: str, device: str, refusals: Iterable[Refusal]) -> tuple[Counts, Counts]:
    """Layers by backend, and by the reasons of the backend that hands some to portable."""
    from .. import dispatch

    try:
        chosen = dispatch.choose(op, device)
    except (RuntimeError, ValueError):
        return {}, {}
    backend = chosen.load()
    taken: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for refusal in refusals:
        reason = refusal(backend) if hasattr(backend, "refusal") else None
        taken[chosen.name if reason is None else "portable"] += 1
        if reason is not None:
            refused[reason] += 1
    return dict(taken), dict(refused)


def _linear(weight: Tensor, dtype: str, activation_scale: str, backend: ModuleType) -> str | None:
    """Why a backend does not multiply by a weight [N, K] of one rank, or None."""
    N, K = weight.info.shape
    gran = _grid(weight)
    reason: str | None = backend.refusal(
        _empty((1, K), dtype), *_weight((N, K), gran, weight.served), gran, activation_scale
    )
    return reason


def _experts(
    w13: Tensor, w2: Tensor, dtype: str, activation_scale: str, backend: ModuleType
) -> str | None:
    """Why a backend does not multiply by a layer's experts, of one rank, or None."""
    I, H = w13.info.shape  # noqa: E741
    gran13, gran2 = _grid(w13), _grid(w2)
    reason: str | None = backend.experts_refusal(
        _empty((1, H), dtype),
        *_weight((1, 2 * I, H), gran13, w13.served),
        *_weight((1, H, I), gran2, w2.served),
        gran13,
        gran2,
        activation_scale,
    )
    return reason


def _grid(weight: Tensor) -> tuple[int, int]:
    """Rows and columns per scale in the layer that one rank makes of a weight."""
    grid = weight.cuts.get(1, (BLOCK, BLOCK))
    assert not isinstance(grid, str), f"{weight.name}: {grid}"  # one rank cuts nothing
    return grid


def _weight(
    shape: tuple[int, ...], gran: tuple[int, int], served: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [.., N, K] and their scales, without memory."""
    from ..layouts import grid_shape

    scales = (*shape[:-2], *grid_shape(shape[-2], shape[-1], gran))
    return _empty(shape, "float8_e4m3fn"), _empty(
        scales, "float32" if served == "float32 kept" else "uint8"
    )


def _empty(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
