"""Facts of the format, each stated once, and `QuantSpec`, what a checkpoint's config declares.

Block FP8: e4m3 codes with one scale per 128x128 weight block and per 1x128 activation group.
UE8M0 (PTX; E8M0 in OCP MX; `float8_e8m0fnu` in torch) is a scale kept as one byte:
value = 2^(byte - 127), byte 255 = NaN, no zero, no sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FP8_MAX = 448.0  # largest finite e4m3fn value: 1.75 * 2^8
FP8_NAN_CODE = 0x7F  # e4m3fn has no infinity; sign | 0x7F is NaN
SF_BIAS = 127
SF_NAN = 255
SF_MIN, SF_MAX = 1, 254  # the codes that are normal float32 powers of two
# DeepSeek's inference/kernel.py clamps amax to 1e-4 before dividing by 448; after rounding up to
# a power of two that clamp is a floor on the byte: ceil(log2(1e-4 / 448)) + 127.
AMAX_FLOOR = 1e-4
SF_FLOOR = 105
BLOCK = 128
# Triton's fp8 dot needs K >= 32, so activation groups cannot be finer than that.
MIN_GROUP_K = 32

ACTIVATION_SCALES = ("ue8m0", "fp32", "none")
NON_POW2_POLICIES = ("keep", "requant", "error")
OPTIONS = {"activation_scale": ACTIVATION_SCALES, "non_pow2": NON_POW2_POLICIES}


# Architectures with a model tree of their own, whose indexer or fp4 experts the quantization method
# does not serve: refused rather than half served.
REFUSED_MODELS = {
    "deepseek_v32": "its sparse-attention indexer loads quantized linears by code of its own",
    "deepseek_v4": "its experts are MXFP4 and vLLM serves it by a method of its own",
}


class ConfigError(ValueError):
    """A quantization config that this project does not serve; the text says what to do."""


@dataclass(frozen=True)
class QuantSpec:
    """What a checkpoint declares about its quantization, and how it is to be treated.

    scale_fmt         "ue8m0", or None for a checkpoint that declares float32 scales
    block_shape       (rows, columns) of a weight block
    ignored_layers    prefixes of layers that are not quantized
    activation_scale  "ue8m0" | "fp32" | "none": how activations are quantized (none: kept bf16)
    non_pow2          "keep" | "requant" | "error": what happens to weight scales not c * 2^k
    """

    scale_fmt: str | None = "ue8m0"
    block_shape: tuple[int, int] = (BLOCK, BLOCK)
    ignored_layers: tuple[str, ...] = ()
    activation_scale: str = "ue8m0"
    non_pow2: str = "keep"

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> QuantSpec:
        """Parse a Hugging Face `quantization_config`; raises ConfigError for what is not served."""
        method = config.get("quant_method")
        if not method:  # vLLM stands in "" for a missing one
            raise ConfigError(
                f"quantization_config has no 'quant_method' (keys found: {sorted(config)}). "
                "If it comes from --hf-overrides: that replaces the whole quantization_config, so "
                "either repeat every key of the checkpoint's, or set options with "
                '--additional-config \'{"ue8m0": {"activation_scale": "fp32"}}\' instead.'
            )
        if method not in ("fp8", "ue8m0"):
            raise ConfigError(
                f"quant_method is {method!r}; ue8m0 serves checkpoints whose quant_method is 'fp8' "
                "(block FP8) or 'ue8m0'. Serve this one without --quantization ue8m0, or quantize "
                "its unquantized original with `vllm-ue8m0 convert SRC DST --to ue8m0`."
            )
        _require(config, "fmt", ("e4m3",), default="e4m3")
        _require(config, "activation_scheme", ("dynamic",), default="dynamic")
        scale_fmt = _require(config, "scale_fmt", (None, "ue8m0", "fp32", "float32"), default=None)
        if method == "ue8m0":
            scale_fmt = scale_fmt or "ue8m0"
        block = config.get("weight_block_size")
        if method == "ue8m0" and block is None:
            block = [BLOCK, BLOCK]
        if not isinstance(block, (list, tuple)) or list(block) != [BLOCK, BLOCK]:
            raise ConfigError(
                f"weight_block_size is {block!r}; allowed: [{BLOCK}, {BLOCK}]. Checkpoints with "
                "per-tensor scales or other block shapes have to be served with --quantization fp8."
            )
        if config.get("expert_dtype", "fp8") != "fp8":
            raise ConfigError(
                f"expert_dtype is {config['expert_dtype']!r}; allowed: 'fp8'. Its experts are not "
                "128x128 block FP8: serve this checkpoint without --quantization ue8m0."
            )
        ignored = config.get("ignored_layers") or config.get("modules_to_not_convert") or ()
        if not isinstance(ignored, (list, tuple)) or not all(isinstance(i, str) for i in ignored):
            raise ConfigError(
                f"ignored_layers or modules_to_not_convert is {ignored!r}; allowed: a list of "
                "module names."
            )
        declared = "ue8m0" if scale_fmt == "ue8m0" else None
        return cls(
            scale_fmt=declared,
            ignored_layers=tuple(ignored),
            activation_scale="ue8m0" if declared else "fp32",
        ).with_options({key: config[key] for key in OPTIONS if key in config})

    @classmethod
    def from_inference_config(cls, config: Mapping[str, Any]) -> QuantSpec:
        """Parse DeepSeek's own inference config, e.g. {"dtype": "fp8", "scale_fmt": "ue8m0"}."""
        dtype = _require(config, "dtype", ("fp8", "bf16"), default="bf16")
        if dtype != "fp8":
            raise ConfigError(
                "dtype is 'bf16'; allowed: 'fp8'. The model is not quantized: convert it with "
                "`vllm-ue8m0 convert SRC DST --to ue8m0`."
            )
        return cls.from_hf_config(
            {
                "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK],
                "scale_fmt": config.get("scale_fmt"),
            }
        )

    def with_options(self, options: Mapping[str, Any]) -> QuantSpec:
        """Replace the selectable options; raises ConfigError for an unknown key or value."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for key, value in options.items():
            if key not in OPTIONS:
                raise ConfigError(f"unknown ue8m0 option {key!r}; allowed: {', '.join(OPTIONS)}.")
            if value not in OPTIONS[key]:
                raise ConfigError(
                    f"ue8m0 option {key} is {value!r}; allowed: {', '.join(OPTIONS[key])}."
                )
            values[key] = value
        return QuantSpec(**values)

    def options(self) -> dict[str, str]:
        """The options that change numerics, as they enter vLLM's compile hash."""
        return {key: getattr(self, key) for key in OPTIONS}


def check_model_type(model_type: Any) -> None:
    """Raise ConfigError for a model whose architecture is not served."""
    if isinstance(model_type, str) and model_type in REFUSED_MODELS:
        raise ConfigError(
            f"--quantization ue8m0 does not serve {model_type} models: "
            f"{REFUSED_MODELS[model_type]}. Serve it without --quantization ue8m0."
        )


def _require(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...], default: Any) -> Any:
    value = config.get(key, default)
    if value not in allowed:
        names = ", ".join("absent" if v is None else repr(v) for v in allowed)
        hint = " Static activation scales are not served." if value == "static" else ""
        raise ConfigError(
            f"quantization_config[{key!r}] is {value!r}; allowed: {names}.{hint} "
            "Serve this checkpoint with vLLM's own method (leave --quantization ue8m0 out), or "
            "convert it with `vllm-ue8m0 convert`."
        )
    return value
