"""Convert a checkpoint directory to block FP8 with UE8M0 scales, or block FP8 back to bf16.

The output is planned from the source's headers, then written tensor by tensor in the source's
order; peak memory does not depend on the model's size. A directory without config.json is an
unfinished one: config.json is written last. The same source gives the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from ..formats import BLOCK, QuantSpec
from .check import (
    FLOAT_DTYPES,
    check_scales,
    find_scale,
    is_fp8_weight,
    raise_problems,
)
from .shards import INDEX_NAME, SINGLE_NAME, Checkpoint, CheckpointError, open_checkpoint
from .steps import SCALE_DTYPES, Copy, Dequantize, KeepExact, Quantize, Step
from .writer import ShardWriter, num_bytes, write_json

TARGETS = ("ue8m0", "bf16")
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


class Summary(NamedTuple):
    """What `convert` did: tensors converted and copied, bytes of tensors read and written."""

    converted: int
    copied: int
    bytes_read: int
    bytes_written: int


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "ue8m0",
    scale_dtype: str = "float32",
    quant_method: str = "fp8",
    ignore: Iterable[str] = DEFAULT_IGNORE,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Convert the checkpoint in `src` into the new or empty directory `dst`.

    to            "ue8m0": quantize the 2-D float weights of linear layers; or, from block FP8
                  whose scales are all 2^k, keep every number. "bf16": dequantize block FP8
    scale_dtype   how scales are stored: "float32" (readable everywhere), "uint8", "float8_e8m0fnu"
    quant_method  "fp8", or "ue8m0", which vLLM then serves with this plugin without a flag
    ignore        patterns (fnmatch) of module names whose weights are not quantized
    progress      called with (bytes done, bytes in all)

    Raises CheckpointError (source or destination not usable, NaN or Inf in a weight), ConfigError
    (the source's quantization is of another kind), ValueError (arguments), OSError. Nothing is
    left in `dst` then.
    """
    _require("to", to, TARGETS)
    _require("scale_dtype", scale_dtype, SCALE_DTYPES)
    _require("quant_method", quant_method, QUANT_METHODS)
    source, target = open_checkpoint(src), Path(dst)
    steps = plan(source, to, scale_dtype, tuple(ignore))
    config = _config(source, steps, to, quant_method)
    shards = split(steps, max_shard_bytes)
    files = _other_files(Path(src))
    _check_target(Path(src), target)
    size = sum(num_bytes(*tensor) for step in steps for tensor in step.layout.values())
    _check_space(target, size + sum(file.stat().st_size for file in files))

    created = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        _write(source, target, shards, progress)
        for file in files:
            copy = target / file.relative_to(src)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        write_json(target / "config.json", config)
    except BaseException:
        # The directory was empty; a partial conversion is of no use to anyone.
        for entry in target.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        if created:
            target.rmdir()
        raise
    copied = sum(isinstance(step, Copy) for step in steps)
    return Summary(len(steps) - copied, copied, _source_bytes(source, steps), size)


def plan(source: Checkpoint, to: str, scale_dtype: str, ignore: tuple[str, ...]) -> list[Step]:
    """One step per output tensor (with its scale), in the source's order on disk."""
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
        info = tensors[name]
        if name in scales:
            continue
        if info.dtype == "F8_E4M3":
            scale = find_scale(name, tensors) if is_fp8_weight(name, info) else None
            if scale is None:
                raise CheckpointError(
                    f"{name} is F8_E4M3 {list(info.shape)}; convert handles 2-D tensors named "
                    "*.weight with block scales only."
                )
            if to == "bf16":
                steps.append(Dequantize(name, source, scale))
            else:
                steps.append(KeepExact(name, source, scale, scale_dtype))
        elif not fp8 and to == "ue8m0" and _is_quantized(source, name, ignore):
            steps.append(Quantize(name, source, scale_dtype))
        else:
            steps.append(Copy(name, source))
    if all(isinstance(step, Copy) for step in steps):
        wanted = (
            "F8_E4M3 weight" if to == "bf16" or quantization else "2-D float weight to quantize"
        )
        raise CheckpointError(f"{source.path} has no {wanted}: there is nothing to convert.")
    return steps


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
        size = sum(num_bytes(*tensor) for tensor in step.layout.values())
        if filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(step)
        filled += size
    return shards


def _write(
    source: Checkpoint,
    target: Path,
    shards: list[list[Step]],
    progress: Callable[[int, int], None] | None,
) -> None:
    total = _source_bytes(source, [step for steps in shards for step in steps])
    done, written = 0, 0
    weight_map: dict[str, str] = {}
    for number, steps in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        file = SINGLE_NAME if len(shards) == 1 else file
        layout = {name: tensor for step in steps for name, tensor in step.layout.items()}
        weight_map |= dict.fromkeys(layout, file)
        written += sum(num_bytes(*tensor) for tensor in layout.values())
        with ShardWriter(target / file, layout) as shard:
            for step in steps:
                for count in step.run(shard):
                    done += count
                    if progress is not None:
                        progress(done, total)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": written},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(target / INDEX_NAME, index)


def _source_bytes(source: Checkpoint, steps: Iterable[Step]) -> int:
    infos = (source.tensors[step.name] for step in steps)
    return sum(info.end - info.start for info in infos)


def _config(source: Checkpoint, steps: list[Step], to: str, quant_method: str) -> dict[str, Any]:
    if not source.config:
        raise CheckpointError(f"{source.path} has no config.json, which a converted model needs.")
    config = dict(source.config)
    declared = config.pop("quantization_config", None) or {}
    if to == "bf16":
        return config
    block = {"weight_block_size": [BLOCK, BLOCK], "scale_fmt": "ue8m0"}
    fixed = {"quant_method": quant_method, "fmt": "e4m3", "activation_scheme": "dynamic", **block}
    config["quantization_config"] = {**declared, **fixed}
    # A source that is FP8 already says itself what it left out.
    if any(isinstance(step, Quantize) for step in steps):
        skipped = [s.name.removesuffix(".weight") for s in steps if _is_skipped_linear(source, s)]
        if skipped:
            config["quantization_config"]["modules_to_not_convert"] = sorted(skipped)
    return config


def _is_skipped_linear(source: Checkpoint, step: Step) -> bool:
    info, module = source.tensors[step.name], step.name.removesuffix(".weight")
    linear = len(info.shape) == 2 and info.dtype in FLOAT_DTYPES and module != step.name
    return linear and isinstance(step, Copy) and not matches(module, _NOT_LINEAR)


def _other_files(src: Path) -> list[Path]:
    """Tokenizer, generation config, code: every file that is not weights, config or hidden."""
    found = []
    for file in sorted(src.rglob("*")):
        parts = file.relative_to(src).parts
        if file.is_file() and not any(matches(part, _NOT_COPIED) for part in parts):
            found.append(file)
    return found


def _check_target(src: Path, dst: Path) -> None:
    source, target = src.resolve(), dst.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise CheckpointError(f"{dst} is, contains or lies in the source {src}; give another DST.")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst} exists and is not an empty directory; remove it first.")


def _check_space(dst: Path, needed: int) -> None:
    existing = next(p for p in (dst.resolve(), *dst.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{dst} needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free there."
        )


def _require(name: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise ValueError(f"convert: {name} is {value!r}; allowed: {', '.join(allowed)}.")
