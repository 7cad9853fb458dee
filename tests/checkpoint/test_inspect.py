"""`inspect`: classes, faults, configs that are refused, against hand-made checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from inspected import FIXTURES, MODEL, UE8M0, C, one, problems, write
from tiny_checkpoints import E4M3, E8M0, fp8_model, linears, write_checkpoint

from vllm_ue8m0 import convert, inspect
from vllm_ue8m0.checkpoint import show
from vllm_ue8m0.codec import convert_scale_from_ue8m0


def test_trained_fixture_is_servable_as_bytes() -> None:
    report = inspect(MODEL)
    assert report.servable and report.problems == []
    assert report.total()["served"] == {"bytes": 72, "unquantized": 23}
    data = report.to_json()
    down = next(t for t in data["tensors"] if t["name"].endswith("layers.0.mlp.down_proj.weight"))
    assert down["class"] == "pow2" and down["c"] == 1.0 and down["min_exponent"] == -10
    assert sum(data["total"]["exponents"].values()) == data["total"]["scales"] == 288


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, E8M0])
def test_classes_and_exponents_in_every_container(tmp_path: Path, dtype: torch.dtype) -> None:
    code = torch.tensor([[1, 254, 127], [126, 128, 127], [120, 127, 130]], dtype=torch.uint8)
    scale = convert_scale_from_ue8m0(code)
    stored = {torch.uint8: code, E8M0: code.view(E8M0)}.get(dtype)
    report = inspect(write(tmp_path, fp8_model(scale.to(dtype) if stored is None else stored)))
    found = one(report)
    assert found.kind == "pow2" and found.served == "bytes" and report.servable
    assert found.stats is not None
    expected = {-126: 1, 127: 1, 0: 3, -1: 1, 1: 1, -7: 1, 3: 1}
    assert found.stats.exponents == expected == dict(report.exponents())
    assert one(report, "b.weight").kind == "unquantized"
    assert "a.weight_scale_inv" not in {tensor.name for tensor in report.tensors}


def test_factored_and_arbitrary(tmp_path: Path) -> None:
    scale = torch.tensor(C) * 2.0 ** torch.randint(-16, -8, (3, 3))
    found = one(inspect(write(tmp_path / "c", fp8_model(scale))))
    assert (found.kind, found.served) == ("factored", "bytes and c")
    assert found.stats is not None and found.stats.c == C
    scale[1, 1] = torch.nextafter(scale[1, 1], torch.tensor(9.0))
    for policy, served in (("keep", "float32 kept"), ("requant", "requantized")):
        report = inspect(write(tmp_path / policy, fp8_model(scale), non_pow2=policy))
        found = one(report)
        assert (found.kind, found.served, report.servable) == ("arbitrary", served, True)
        assert found.to_json()["c"] is None
        assert found.to_json()["max_exponent"] == int(torch.frexp(scale.max())[1]) - 1
    text = "a.weight has scales that are neither 2^k nor c * 2^k, and non_pow2 is 'error'."
    assert problems(inspect(write(tmp_path / "e", fp8_model(scale), non_pow2="error"))) == [text]


@pytest.mark.parametrize(
    ("value", "field", "words"),
    [
        (torch.nan, "nan", r"is NaN for block \[1, 2\] \(1 of 9 scales\)"),
        (torch.inf, "inf", r"is infinite for block \[1, 2\]"),
        (-torch.inf, "inf", r"is infinite for block \[1, 2\]"),
        (-1.0, "negative", r"is negative for block \[1, 2\]"),
        (0.0, "zero", r"is zero or below 2\^-126 for block \[1, 2\].* weights are not zero"),
        (-0.0, "zero", r"is zero or below 2\^-126 for block \[1, 2\].* weights are not zero"),
        (2.0**-127, "subnormal", r"is zero or below 2\^-126 for block \[1, 2\]"),
    ],
)
def test_scales_that_cannot_be_served(tmp_path: Path, value: float, field: str, words: str) -> None:
    scale = torch.ones(3, 3)
    scale[1, 2] = value
    report = inspect(write(tmp_path, fp8_model(scale)))
    (text,) = problems(report)
    assert re.search(words, text), text
    assert text.startswith("a.weight_scale_inv ")
    found = one(report)
    assert found.served == "refused" and found.kind == "pow2"
    assert found.stats is not None and getattr(found.stats, field) == 1
    assert sum(found.stats.exponents.values()) == 8


@pytest.mark.parametrize("code", [0, 255])
@pytest.mark.parametrize("dtype", [torch.uint8, E8M0])
def test_codes_without_a_number(tmp_path: Path, code: int, dtype: torch.dtype) -> None:
    scale = torch.full((3, 3), 120, dtype=torch.uint8)
    scale[2, 1] = code
    report = inspect(write(tmp_path, fp8_model(scale.view(dtype))))
    (text,) = problems(report)
    assert f"byte {code}" in text and "[2, 1]" in text
    total = report.total()
    assert (total["code_0"], total["code_255"]) == (int(code == 0), int(code == 255))


@pytest.mark.parametrize("value", [0.0, 2.0**-127, 1e-40, "code"])
def test_zero_scales_pass_over_zero_blocks(tmp_path: Path, value: float | str) -> None:
    scale = torch.full((3, 3), 2.0**-9)
    if value == "code":
        scale = torch.full((3, 3), 118, dtype=torch.uint8)
    scale[2, 2] = 0 if value == "code" else value
    tensors = fp8_model(scale)
    codes = tensors["a.weight"].view(torch.uint8)
    codes[256:, 256:] = 0x80  # minus zero; the last block is a partial one
    report = inspect(write(tmp_path / "zero", tensors))
    found = one(report)
    assert problems(report) == [] and (found.kind, found.served) == ("pow2", "bytes")
    codes[299, 256] = 1
    assert len(problems(inspect(write(tmp_path / "one", tensors)))) == 1


def test_missing_orphan_and_misshapen_scales(tmp_path: Path) -> None:
    tensors = fp8_model()
    lonely = {"c.weight": tensors["a.weight"].clone(), "d.weight_scale_inv": torch.ones(3, 3)}
    report = inspect(write(tmp_path, {**tensors, **lonely, "a.weight_scale_inv": torch.ones(2, 3)}))
    starts = ["a.weight_scale_inv is [2, 3]", "c.weight is F8_E4M3", "d.weight_scale_inv has no"]
    assert [text[: len(start)] for text, start in zip(problems(report), starts, strict=True)] == (
        starts
    )
    assert [(t.name, t.kind, t.served) for t in report.tensors] == [
        ("a.weight", "pow2", "refused"),
        ("b.weight", "unquantized", "unquantized"),
        ("c.weight", None, "refused"),
    ]


def test_scale_in_another_shard_is_no_problem(tmp_path: Path) -> None:
    tensors = fp8_model()
    scale = {"a.weight_scale_inv": tensors.pop("a.weight_scale_inv")}
    report = inspect(write(tmp_path, tensors, scale))
    assert report.servable and one(report).scale_elsewhere
    assert report.total()["scales_in_other_shards"] == 1
    assert "1 scales lie in another shard" in show.text(report)


@pytest.mark.parametrize("suffix", ["scale", "weight_scale"])
def test_other_names_are_understood_but_vllm_does_not_load_them(
    tmp_path: Path, suffix: str
) -> None:
    tensors = fp8_model(torch.ones(3, 3))
    tensors[f"a.{suffix}"] = tensors.pop("a.weight_scale_inv")
    report = inspect(write(tmp_path, tensors))
    assert one(report).kind == "pow2" and one(report).scale == f"a.{suffix}"
    (text,) = problems(report)
    assert text.startswith(f"a.{suffix} is a name") and "a.weight_scale_inv" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [("deepseek-v3.2", "sparse-attention indexer"), ("deepseek-v4-flash", "MXFP4")],
)
def test_models_that_are_refused(tmp_path: Path, name: str, words: str) -> None:
    config = json.loads((FIXTURES / f"configs/{name}.json").read_text())
    tensors = {"a.weight": fp8_model()["a.weight"]}
    tensors["a.scale"] = torch.full((3, 3), 120, dtype=torch.uint8).view(E8M0)
    # Packed fp4 experts with a scale per 32 columns beside it are another format's.
    tensors["e.weight"] = torch.ones(4, 16, dtype=torch.int8)
    tensors["e.scale"] = torch.full((4, 1), 120, dtype=torch.uint8).view(E8M0)
    report = inspect(write(tmp_path, tensors, config=config))
    (text,) = problems(report)
    assert text.startswith("config.json is not served: ") and words in text
    assert [(t.name, t.kind, t.served) for t in report.tensors] == [
        ("a.weight", "pow2", "refused"),
        ("e.weight", None, "refused"),
    ]


CONFIGS = {
    "has no quantization_config, so its weights are not FP8": ({}, False),
    "has no quantization_config, but 1 tensors are F8_E4M3": ({}, True),
    "has a quantization_config that is [1]": ({"quantization_config": [1]}, True),
    "is not served: quant_method is 'gptq'": (
        {"quantization_config": {"quant_method": "gptq"}},
        True,
    ),
    "is not served: weight_block_size is [64, 64]": (
        {"quantization_config": {**UE8M0, "weight_block_size": [64, 64]}},
        True,
    ),
    "is not served: expert_dtype is 'fp4'": (
        {"quantization_config": UE8M0, "expert_dtype": "fp4"},
        True,
    ),
    "declares block FP8, but no tensor is F8_E4M3": ({"quantization_config": UE8M0}, False),
}


@pytest.mark.parametrize("words", CONFIGS)
def test_configs_that_are_refused(tmp_path: Path, words: str) -> None:
    config, fp8 = CONFIGS[words]
    write_checkpoint(tmp_path, fp8_model() if fp8 else {"b.weight": torch.ones(2, 2)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    text = problems(inspect(tmp_path))[0]
    assert text.startswith("config.json " + words)


def test_dtypes_that_do_not_match_the_config(tmp_path: Path) -> None:
    up = "model.layers.0.mlp.up_proj"
    bf16 = {f"{up}.weight": torch.ones(8, 8).bfloat16()}
    mtp = {"model.layers.7.mlp.up_proj.weight": torch.ones(8, 8).bfloat16()}
    tensors = {**fp8_model(), **bf16, **mtp}
    config = {"num_hidden_layers": 7}
    (text,) = problems(inspect(write(tmp_path / "a", tensors, config=config)))
    assert text.startswith(f"{up}.weight is BF16, but vLLM expects F8_E4M3")
    listed = write(tmp_path / "b", tensors, config=config, modules_to_not_convert=[up])
    assert problems(inspect(listed)) == []
    (text,) = problems(inspect(write(tmp_path / "c", fp8_model(), ignored_layers=["a"])))
    assert text.startswith("a.weight is F8_E4M3, but config.json names its module as not")
    experts = {**fp8_model(), "experts.gate_up": torch.ones(2, 8, 8).to(E4M3)}
    (text,) = problems(inspect(write(tmp_path / "d", experts)))
    assert text.startswith("experts.gate_up is F8_E4M3 [2, 8, 8]; served are 2-D")


def test_converted_checkpoints_are_servable(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", linears())
    for dtype in ("float32", "uint8", "float8_e8m0fnu"):
        convert(tmp_path / "a", tmp_path / dtype, scale_dtype=dtype)
        report = inspect(tmp_path / dtype)
        assert report.servable and {t.kind for t in report.tensors} == {"pow2"}
    assert not inspect(tmp_path / "a").servable


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_routers_that_vllm_takes_for_quantized(tmp_path: Path, model_type: str) -> None:
    """As serving them does, inspect asks for the router's name in Qwen3-MoE's config."""
    gate = "model.layers.0.mlp.gate"
    tensors = {**fp8_model(), f"{gate}.weight": torch.ones(8, 8).bfloat16()}
    config = {"model_type": model_type}
    found = problems(inspect(write(tmp_path / "a", tensors, config=config)))
    assert [gate in text for text in found] == ([True] if model_type == "qwen3_moe" else [])
    listed = write(tmp_path / "b", tensors, config=config, modules_to_not_convert=[gate])
    assert problems(inspect(listed)) == []
