"""QuantSpec: what is read from a config, what is refused, and that the refusal says what to do."""

import json
from pathlib import Path

import pytest

from vllm_ue8m0.formats import ConfigError, QuantSpec

CONFIGS = Path(__file__).parent / "fixtures/configs"
V31 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "scale_fmt": "ue8m0",
}


def quantization_config(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())["quantization_config"]


@pytest.mark.parametrize("name", ["deepseek-v3.1", "deepseek-v3.1-terminus", "deepseek-v3.2"])
def test_spec_declared_ue8m0(name):
    spec = QuantSpec.from_hf_config(quantization_config(name))
    assert (spec.scale_fmt, spec.activation_scale, spec.non_pow2) == ("ue8m0", "ue8m0", "keep")
    assert spec.block_shape == (128, 128)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-r1"])
def test_spec_undeclared_keeps_float32_activation_scales(name):
    spec = QuantSpec.from_hf_config(quantization_config(name))
    assert (spec.scale_fmt, spec.activation_scale) == (None, "fp32")


def test_spec_inference_config():
    assert QuantSpec.from_inference_config({"dtype": "fp8", "scale_fmt": "ue8m0"}) == (
        QuantSpec.from_hf_config(V31)
    )
    assert QuantSpec.from_inference_config({"dtype": "fp8"}).activation_scale == "fp32"
    with pytest.raises(ConfigError, match="vllm-ue8m0 convert"):
        QuantSpec.from_inference_config({"dtype": "bf16"})


def test_spec_ignored_layers():
    both = {**V31, "ignored_layers": ["a"], "modules_to_not_convert": ["b"]}
    assert QuantSpec.from_hf_config(both).ignored_layers == ("a",)
    assert QuantSpec.from_hf_config({**V31, "modules_to_not_convert": ["b"]}).ignored_layers == (
        "b",
    )


def test_spec_own_method_needs_nothing_else():
    spec = QuantSpec.from_hf_config({"quant_method": "ue8m0"})
    assert (spec.scale_fmt, spec.activation_scale) == ("ue8m0", "ue8m0")


def test_spec_options():
    spec = QuantSpec.from_hf_config({**V31, "activation_scale": "none", "non_pow2": "error"})
    assert spec.options() == {"activation_scale": "none", "non_pow2": "error"}
    assert spec.with_options({"activation_scale": "fp32"}).activation_scale == "fp32"
    with pytest.raises(ConfigError, match="activation_scale is 'bf16'; allowed: ue8m0, fp32, none"):
        spec.with_options({"activation_scale": "bf16"})
    with pytest.raises(ConfigError, match="unknown ue8m0 option 'activaton_scale'"):
        spec.with_options({"activaton_scale": "fp32"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_fmt": "e5m3"}, r"'scale_fmt'\] is 'e5m3'; allowed: absent, 'ue8m0'"),
        ({"fmt": "e5m2"}, r"'fmt'\] is 'e5m2'; allowed: 'e4m3'"),
        ({"activation_scheme": "static"}, "Static activation scales are not served"),
        ({"activation_scheme": "odd"}, r"'odd'; allowed: 'dynamic'"),
        ({"weight_block_size": [32, 32]}, r"\[32, 32\]; allowed: \[128, 128\]"),
        ({"weight_block_size": None}, "per-tensor scales"),
        ({"quant_method": "awq"}, "quant_method is 'awq'"),
        ({"quant_method": ""}, "--hf-overrides"),
        ({"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
    ],
)
def test_spec_refusals_say_what_to_do(change, message):
    with pytest.raises(ConfigError, match=message):
        QuantSpec.from_hf_config({**V31, **change})
