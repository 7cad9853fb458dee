"""What can be wrong with the scales of a block FP8 checkpoint, found from its headers alone.

A 2-D F8_E4M3 tensor X.weight [N, K] has one scale tensor [ceil(N/128), ceil(K/128)], named
X.weight_scale_inv (DeepSeek-V3, Qwen, GLM), X.scale (DeepSeek-V4) or X.weight_scale
(compressed-tensors). All three are multiplied on dequantization, whatever the name says.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..formats import BLOCK
from ..layouts import grid_shape
from .shards import INDEX_NAME, Checkpoint, CheckpointError, TensorInfo, open_checkpoint

SCALE_SUFFIXES = (".weight_scale_inv", ".scale", ".weight_scale")
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0", "U8")
FLOAT_DTYPES = ("BF16", "F16", "F32")
_SHOWN = 5


class Problem(NamedTuple):
    """One finding: the tensor it is about, and a sentence that starts behind its name."""

    tensor: str
    problem: str


def declared_block(checkpoint: Checkpoint) -> tuple[int, int]:
    """Rows and columns of a weight block: what config.json says, or 128 x 128."""
    declared = checkpoint.config.get("quantization_config")
    block = declared.get("weight_block_size") if isinstance(declared, dict) else None
    if isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block):
        return block[0], block[1]
    return BLOCK, BLOCK


def is_fp8_weight(name: str, info: TensorInfo) -> bool:
    """A 2-D e4m3 weight, which must have a scale."""
    return info.dtype == "F8_E4M3" and len(info.shape) == 2 and name.endswith(".weight")


def find_scale(weight: str, tensors: Container[str]) -> str | None:
    """The name of the scale tensor of X.weight, or None."""
    module = weight.removesuffix(".weight")
    return next((module + s for s in SCALE_SUFFIXES if module + s in tensors), None)


def check_scales(
    tensors: Mapping[str, TensorInfo],
    ignored: Iterable[str] = (),
    block: tuple[int, int] = (BLOCK, BLOCK),
) -> list[Problem]:
    """Missing, misshapen, mistyped and orphan scales; `ignored` are module names, not checked."""
    skipped = tuple(f"{name}." for name in ignored)
    problems = []
    scales: set[str] = set()
    for name, info in tensors.items():
        if not is_fp8_weight(name, info) or name.startswith(skipped):
            continue
        scale = find_scale(name, tensors)
        if scale is None:
            problems.append(Problem(name, _missing(name, info)))
            continue
        scales.add(scale)
        found, expected = tensors[scale], grid_shape(info.shape[0], info.shape[1], block)
        if found.dtype not in SCALE_DTYPES:
            problems.append(
                Problem(scale, f"has dtype {found.dtype}; allowed: {', '.join(SCALE_DTYPES)}.")
            )
        if found.shape != expected:
            problems.append(Problem(scale, _misshapen(info, found, expected, block)))
    for name, info in tensors.items():
        if name.endswith(SCALE_SUFFIXES) and name not in scales and not name.startswith(skipped):
            problems.extend(_orphan(name, info, tensors))
    return problems


def _missing(name: str, info: TensorInfo) -> str:
    names = ", ".join(name.removesuffix(".weight") + suffix for suffix in SCALE_SUFFIXES)
    return (
        f"is F8_E4M3 {list(info.shape)} without a scale; expected one of {names}. Its codes mean "
        "nothing without it: fetch the missing shard, or convert the model again."
    )


def _misshapen(
    weight: TensorInfo, found: TensorInfo, expected: tuple[int, int], block: tuple[int, int]
) -> str:
    if found.shape == expected[::-1]:
        hint = "It looks transposed."
    elif len(found.shape) < 2 or found.shape[1] == 1:
        hint = "It looks like a per-tensor or per-channel scale: serve it with --quantization fp8."
    else:
        hint = "Truncated, or quantized with another block shape?"
    return (
        f"is {list(found.shape)}; a weight {list(weight.shape)} in {block[0]}x{block[1]} blocks "
        f"needs {list(expected)}. {hint}"
    )


def _orphan(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> list[Problem]:
    suffix = next(s for s in SCALE_SUFFIXES if name.endswith(s))
    weight = name.removesuffix(suffix) + ".weight"
    # Norms and other formats have parameters called scale and weight_scale too.
    certain = suffix == ".weight_scale_inv" or info.dtype == "F8_E8M0"
    if weight not in tensors:
        text = f"has no weight: {weight} is not in the checkpoint. Fetch the missing shard."
        return [Problem(name, text)] if certain else []
    owner = tensors[weight]
    if owner.dtype in FLOAT_DTYPES and certain:
        text = (
            f"belongs to {weight}, which is {owner.dtype}, not F8_E4M3: either the weight was "
            "dequantized and the scale left behind, or shards of two models are mixed."
        )
        return [Problem(name, text)]
    if is_fp8_weight(weight, owner):
        return [Problem(name, f"is a second scale of {weight}, beside another; remove one.")]
    return []


def raise_problems(path: str, problems: list[Problem]) -> None:
    """Raise one CheckpointError that lists the first few problems, if there are any."""
    if not problems:
        return
    lines = [f"{problem.tensor} {problem.problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"... and {len(problems) - _SHOWN} more.")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise CheckpointError("\n  ".join([f"{path}: {count} with FP8 scales:", *lines]))


def check_local_checkpoint(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if the scales of the checkpoint in directory `path` are not usable.

    Returns silently where there is nothing to read: not a local directory, or one without
    safetensors (a config alone, as with `--load-format dummy`; other weight formats).
    """
    directory = Path(path)
    files = [file.name for file in directory.glob("*.safetensors")] if directory.is_dir() else []
    if not files and not (directory / INDEX_NAME).exists():
        return
    # vLLM's sharded_state format: one full set of names per rank, already laid out for serving.
    if any(name.startswith("model-rank-") for name in files):
        return
    checkpoint = open_checkpoint(directory)
    config = checkpoint.config.get("quantization_config")
    config = config if isinstance(config, dict) else {}
    ignored = config.get("ignored_layers") or config.get("modules_to_not_convert") or ()
    raise_problems(str(directory), check_scales(checkpoint.tensors, ignored))
