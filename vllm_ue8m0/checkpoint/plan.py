"""Decide what `convert` does to every tensor, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..codec import ScaleClass
from ..formats import BLOCK, QuantSpec
from .check import FLOAT_DTYPES, check_scales, find_scale, is_fp8_weight, raise_problems
from .scales import check_bf16_range, classify
from .shards import Checkpoint, CheckpointError
from .steps import (
    SCALE_DTYPES,
    Copy,
    Dequantize,
    KeepExact,
    KeepScales,
    Quantize,
    Requantize,
    Step,
    output_bytes,
)

TARGETS = ("ue8m0", "bf16", "fp32-scales")
QUANT_METHODS = ("fp8", "ue8m0")
# 2-D tensors named *.weight that no quantized linear layer reads.
_NOT_LINEAR = ("*embed*", "*.wte", "*.wpe", "*norm*")
# Modules left unquantized: those above, heads, routers, and the projections that DeepSeek's own
# FP8 checkpoints keep in bf16; vision towers, as Qwen's FP8 checkpoints keep them.
DEFAULT_IGNORE = (
    *_NOT_LINEAR, "*lm_head", "*.shared_head.head", "*score", "*.gate", "*_gate", "*router*",
    "*.eh_proj", "*.weights_proj", "*visual*", "*vision*",
)  # fmt: skip
# Other formats' weights would double the copy and mislead a loader.
_NOT_COPIED = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth",
    "*.gguf", "*.onnx", "*.h5", "*.msgpack", ".*", "config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The arguments of `convert` on which the result depends; checked on creation."""

    to: str
    scale_dtype: str
    quant_method: str
    requantize: bool
    ignore: tuple[str, ...]
    max_shard_bytes: int

    def __post_init__(self) -> None:
        _require("to", self.to, TARGETS)
        _require("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        _require("quant_method", self.quant_method, QUANT_METHODS)
        if self.to == "fp32-scales" and self.scale_dtype != "float32":
            raise CheckpointError(
                f"--to fp32-scales stores float32; --scale-dtype {self.scale_dtype} goes with "
                "--to ue8m0 only."
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _require(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"convert: {name} is {value!r}; allowed: {', '.join(allowed)}.")


def plan(source: Checkpoint, options: Options) -> list[Step]:
    """One step per output tensor (with its scale), in the source's order on disk.

    Reads every scale of a block FP8 source: what cannot be converted is refused here.
    """
    tensors = source.tensors
    quantization = source.config.get("quantization_config")
    if quantization is not None:
        extra = {key: source.config[key] for key in ("expert_dtype",) if key in source.config}
        QuantSpec.from_hf_config({**quantization, **extra})
    raise_problems(source.path, check_scales(tensors))
    fp8 = any(info.dtype == "F8_E4M3" for info in tensors.values())
    scales = {find_scale(name, tensors) for name, t in tensors.items() if is_fp8_weight(name, t)}
    steps: list[Step] = []
    for name in sorted(tensors, key=lambda name: (tensors[name].file, tensors[name].start)):
        if name in scales:
            continue
        if tensors[name].dtype == "F8_E4M3":
            steps.append(_fp8_step(source, name, options))
        elif not fp8 and options.to != "bf16" and _is_quantized(source, name, options.ignore):
            steps.append(Quantize(name, source, options.scale_dtype, options.to == "ue8m0"))
        else:
            steps.append(Copy(name, source))
    if all(isinstance(step, Copy) for step in steps):
        wanted = (
            "F8_E4M3 weight"
            if options.to == "bf16" or quantization
            else "2-D float weight to quantize"
        )
        raise CheckpointError(f"{source.path} has no {wanted}: there is nothing to convert.")
    return steps


def _fp8_step(source: Checkpoint, name: str, options: Options) -> Step:
    info = source.tensors[name]
    scale = find_scale(name, source.tensors) if is_fp8_weight(name, info) else None
    if scale is None:
        raise CheckpointError(
            f"{name} is F8_E4M3 {list(info.shape)}; convert handles 2-D tensors named "
            "*.weight with block scales only."
        )
    if options.to == "bf16":
        check_bf16_range(source, name, scale)
        return Dequantize(name, source, scale)
    kind, c = classify(source, name, scale)
    if options.to == "fp32-scales":
        return KeepScales(name, source, scale)
    if kind is ScaleClass.POW2:
        return KeepExact(name, source, scale, options.scale_dtype)
    if kind is ScaleClass.FACTORED and options.scale_dtype == "float32":
        return KeepScales(name, source, scale)
    if options.requantize:
        return Requantize(name, source, scale, options.scale_dtype)
    if kind is ScaleClass.FACTORED:
        raise CheckpointError(
            f"{scale}: the scales are {c} times powers of two, and {options.scale_dtype} stores "
            "powers of two only. --scale-dtype float32 keeps them exactly (serving takes the "
            "factor out); --requantize accepts a second rounding of the weights."
        )
    raise CheckpointError(
        f"{scale}: the scales are not powers of two between 2^-126 and 2^127, and rounding them "
        "would change the weights. Serve the checkpoint as it is, or accept a second rounding of "
        "the weights with --requantize."
    )


def _is_quantized(source: Checkpoint, name: str, ignore: tuple[str, ...]) -> bool:
    info = source.tensors[name]
    if info.dtype not in FLOAT_DTYPES or matches(name.removesuffix(".weight"), ignore):
        return False
    if len(info.shape) == 3 and "experts" in name:
        raise CheckpointError(
            f"{name} holds all experts in one tensor {list(info.shape)}, which convert cannot "
            "quantize; leave the experts as they are with --ignore '*experts*'."
        )
    return len(info.shape) == 2 and name.endswith(".weight") and 0 not in info.shape


def matches(module: str, patterns: Iterable[str]) -> bool:
    """Whether a module name matches one of the fnmatch patterns."""
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def split(steps: list[Step], max_shard_bytes: int) -> list[list[Step]]:
    """Cut the plan into shards of at most max_shard_bytes, a weight and its scale together."""
    shards: list[list[Step]] = []
    filled = max_shard_bytes + 1
    for step in steps:
        size = output_bytes([step])
        if filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(step)
        filled += size
    return shards


def new_config(source: Checkpoint, steps: list[Step], options: Options) -> dict[str, Any]:
    """The converted model's config.json."""
    if not source.config:
        raise CheckpointError(f"{source.path} has no config.json, which a converted model needs.")
    config = dict(source.config)
    declared = config.pop("quantization_config", None) or {}
    if options.to == "bf16":
        return config
    quantization = {
        **{key: value for key, value in declared.items() if key != "scale_fmt"},
        "quant_method": options.quant_method,
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    if options.to == "ue8m0":
        quantization["scale_fmt"] = "ue8m0"
    elif options.quant_method == "ue8m0":
        quantization["scale_fmt"] = "fp32"  # absent, it would mean ue8m0
    # A source that is FP8 already says itself what it left out.
    if any(isinstance(step, Quantize) for step in steps):
        skipped = [s.name.removesuffix(".weight") for s in steps if _is_skipped_linear(source, s)]
        if skipped:
            quantization["modules_to_not_convert"] = sorted(skipped)
    return {**config, "quantization_config": quantization}


def _is_skipped_linear(source: Checkpoint, step: Step) -> bool:
    info, module = source.tensors[step.name], step.name.removesuffix(".weight")
    linear = len(info.shape) == 2 and info.dtype in FLOAT_DTYPES and module != step.name
    return linear and isinstance(step, Copy) and not matches(module, _NOT_LINEAR)


def other_files(src: Path) -> list[Path]:
    """Tokenizer, generation config, code: every file that is not weights, config or hidden."""
    found = []
    for file in sorted(src.rglob("*")):
        parts = file.relative_to(src).parts
        if file.is_file() and not any(matches(part, _NOT_COPIED) for part in parts):
            found.append(file)
    return found
