"""What a checkpoint holds, and what `--quantization ue8m0` will do with it.

Reads headers and scale tensors; of weights only blocks whose scale is zero. The verdict follows
the quantization method: QuantSpec decides about the config, the scales decide about the tensors,
and a layer that vLLM fuses (gate and up, a layer's experts) keeps float32 scales as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ..formats import ConfigError, QuantSpec, check_model_type
from ..layouts import grid_shape
from .check import (
    FLOAT_DTYPES,
    SCALE_DTYPES,
    SCALE_SUFFIXES,
    Problem,
    check_scales,
    declared_block,
    find_scale,
    is_fp8_weight,
)
from .report import NO_CUTS, Report, Tensor
from .serving import Grid, cuts, is_quantized_linear, layer_of
from .shards import Checkpoint, TensorInfo, open_checkpoint
from .stats import Pair, ScaleStats, read_stats

_FP8_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def inspect(directory: str | PathLike[str]) -> Report:
    """Read the headers and scales of a checkpoint directory.

    Raises CheckpointError where the files cannot be read as a checkpoint (truncated, missing,
    overlapping); everything that can be is reported.
    """
    checkpoint = open_checkpoint(Path(directory))
    spec, problems = _read_config(checkpoint)
    block, ignored = declared_block(checkpoint), spec.ignored_layers if spec else ()
    tensors = checkpoint.tensors
    broken = check_scales(tensors, ignored, block)
    scales = {
        name: scale
        for name in tensors
        if name.endswith(".weight") and (scale := _scale_of(name, tensors)) is not None
    }
    stats = read_stats(_pairs(tensors, scales, block))
    if spec is not None:
        broken += _misnamed(scales, tensors)
        broken += _misquantized(checkpoint, spec)
    for weight, scale in scales.items():
        if weight in stats and (fault := stats[weight].fault) is not None:
            broken.append(Problem(scale, fault))
    problems += broken
    hidden = {*scales.values(), *(p.tensor for p in broken if p.tensor.endswith(SCALE_SUFFIXES))}
    names = [name for name in sorted(tensors) if name not in hidden]
    kinds = {name: _kind(tensors[name], name in scales, stats.get(name)) for name in names}
    served = _served(names, kinds, {p.tensor for p in broken}, scales, spec)
    if spec is not None and spec.non_pow2 == "error":
        for name in names:
            if kinds[name] == "arbitrary" and served[name] == "refused":
                text = "has scales that are neither 2^k nor c * 2^k, and non_pow2 is 'error'."
                problems.append(Problem(name, text))
    grids = _grids(names, kinds, tensors, _text_config(checkpoint))
    found = [
        Tensor(
            name,
            tensors[name],
            kinds[name],
            served[name],
            scales.get(name),
            tensors[scales[name]] if name in scales else None,
            stats.get(name),
            grids.get(name, NO_CUTS),
        )
        for name in names
    ]
    return Report(str(directory), not problems, found, problems, spec)


def _read_config(checkpoint: Checkpoint) -> tuple[QuantSpec | None, list[Problem]]:
    """What config.json declares, or why it is not served."""
    declared = checkpoint.config.get("quantization_config")
    count = sum(info.dtype == "F8_E4M3" for info in checkpoint.tensors.values())
    if not declared:
        text = "has no quantization_config"
        if count:
            text += f", but {count} tensors are F8_E4M3. Fetch the model's own config.json."
        else:
            text += (
                ", so its weights are not FP8. Quantize it first: "
                "`vllm-ue8m0 convert SRC DST --to ue8m0`, then serve DST."
            )
        return None, [
            Problem("config.json", text if checkpoint.config else f"is missing or {text}")
        ]
    if not isinstance(declared, Mapping):
        text = f"has a quantization_config that is {declared!r}; allowed: an object."
        return None, [Problem("config.json", text)]
    try:
        check_model_type(checkpoint.config.get("model_type"))
        extra = {k: v for k, v in checkpoint.config.items() if k == "expert_dtype"}
        spec = QuantSpec.from_hf_config({**declared, **extra})
    except ConfigError as error:
        return None, [Problem("config.json", f"is not served: {error}")]
    if not count:
        text = "declares block FP8, but no tensor is F8_E4M3: are shards of two models mixed?"
        return spec, [Problem("config.json", text)]
    return spec, []


def _text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The language model's sizes, which multimodal configs nest."""
    nested = checkpoint.config.get("text_config")
    return {**checkpoint.config, **nested} if isinstance(nested, Mapping) else checkpoint.config


def _scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The scale of a quantized weight, of this format or another's (MXFP4 beside FP8)."""
    return None if tensors[name].dtype in FLOAT_DTYPES else find_scale(name, tensors)


def _pairs(
    tensors: Mapping[str, TensorInfo], scales: Mapping[str, str], block: tuple[int, int]
) -> dict[str, Pair]:
    pairs = {}
    for name, scale in scales.items():
        weight, info = tensors[name], tensors[scale]
        if info.dtype not in SCALE_DTYPES or not is_fp8_weight(name, weight):
            continue
        fits = info.shape == grid_shape(weight.shape[0], weight.shape[1], block)
        pairs[name] = Pair(info, weight if fits else None, block)
    return pairs


def _misnamed(scales: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> list[Problem]:
    """vLLM's models that this method serves load weight_scale_inv and stop at another name."""
    return [
        Problem(
            scale,
            "is a name that vLLM's loaders do not know for this model (KeyError); rename it to "
            f"{weight}_scale_inv.",
        )
        for weight, scale in scales.items()
        if is_fp8_weight(weight, tensors[weight]) and not scale.endswith(".weight_scale_inv")
    ]


def _misquantized(checkpoint: Checkpoint, spec: QuantSpec) -> list[Problem]:
    """Tensors whose dtype is not what config.json makes vLLM expect."""
    problems = []
    ignored = frozenset(spec.ignored_layers)
    under = tuple(f"{name}." for name in ignored)
    config = _text_config(checkpoint)
    for name, info in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if info.dtype in _FP8_DTYPES:
            if module in ignored:
                text = (
                    f"is {info.dtype}, but config.json names its module as not quantized: its "
                    "codes would be taken for numbers. Correct 'modules_to_not_convert'."
                )
                problems.append(Problem(name, text))
            elif not is_fp8_weight(name, info):
                text = (
                    f"is {info.dtype} {list(info.shape)}; served are 2-D F8_E4M3 tensors named "
                    "*.weight with block scales only."
                )
                problems.append(Problem(name, text))
        elif info.dtype in FLOAT_DTYPES and is_quantized_linear(name, config):
            if module in ignored or name.startswith(under):
                continue
            text = (
                f"is {info.dtype}, but vLLM expects F8_E4M3. If the layer is not quantized, name "
                "it in quantization_config's 'modules_to_not_convert'."
            )
            problems.append(Problem(name, text))
    return problems


def _kind(info: TensorInfo, scaled: bool, stats: ScaleStats | None) -> str | None:
    if stats is not None:
        return stats.kind
    return None if scaled or info.dtype in _FP8_DTYPES else "unquantized"


def _served(
    names: list[str],
    kinds: Mapping[str, str | None],
    broken: set[str],
    scales: Mapping[str, str],
    spec: QuantSpec | None,
) -> dict[str, str]:
    """What becomes of every tensor; one arbitrary scale decides for the whole fused layer."""
    if spec is None:
        return dict.fromkeys(names, "refused")
    policy = {"keep": "float32 kept", "requant": "requantized", "error": "refused"}[spec.non_pow2]
    mixed = {layer_of(name).name for name in names if kinds[name] == "arbitrary"}
    served = {}
    for name in names:
        kind = kinds[name]
        if kind is None or name in broken or scales.get(name) in broken:
            served[name] = "refused"
        elif kind == "unquantized":
            served[name] = kind
        elif layer_of(name).name in mixed:
            served[name] = policy
        else:
            served[name] = "bytes" if kind == "pow2" else "bytes and c"
    return served


def _grids(
    names: list[str],
    kinds: Mapping[str, str | None],
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
) -> dict[str, Mapping[int, Grid]]:
    layers = defaultdict(list)
    for name in names:
        if kinds[name] in ("pow2", "factored", "arbitrary"):
            layers[layer_of(name)].append(name)
    grids: dict[str, Mapping[int, Grid]] = {}
    for layer, members in layers.items():
        shapes = [(name, tensors[name].shape) for name in members]
        same = layer.kind.startswith("experts")
        found = cuts(
            layer, [(n, (s[0], s[1])) for n, s in (shapes[:1] if same else shapes)], config
        )
        grids |= dict.fromkeys(members, found)
    return grids
