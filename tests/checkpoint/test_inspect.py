"""`inspect`: classes, faults, what serving will do, the table and the JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic_v31
import torch
from tiny_checkpoints import BLOCK_FP8, E4M3, E8M0, fp8_model, linears, write_checkpoint

from vllm_ue8m0 import convert, inspect
from vllm_ue8m0.checkpoint import show
from vllm_ue8m0.checkpoint.report import Report, Tensor
from vllm_ue8m0.cli import main
from vllm_ue8m0.codec import convert_scale_from_ue8m0

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODEL = FIXTURES / "tiny_deepseek"
UE8M0 = {**BLOCK_FP8, "scale_fmt": "ue8m0"}
C = 1.3228756189346313
Tensors = dict[str, torch.Tensor]


def write(directory: Path, *shards: Tensors, config: object = None, **quantization: object) -> Path:
    write_checkpoint(directory, *shards, quantization={**UE8M0, **quantization})
    if config is not None:
        text = json.loads((directory / "config.json").read_text()) | config
        (directory / "config.json").write_text(json.dumps(text))
    return directory


def one(report: Report, name: str = "a.weight") -> Tensor:
    return next(tensor for tensor in report.tensors if tensor.name == name)


def problems(report: Report) -> list[str]:
    assert report.servable == (not report.problems)
    return [f"{problem.tensor} {problem.problem}" for problem in report.problems]


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


def linear(rows: int = 128, columns: int = 128, scale: float = 1.0, noise: bool = False) -> Tensors:
    grid = (-(-rows // 128), -(-columns // 128))
    s = torch.full(grid, scale) * (1 + noise * torch.rand(grid))
    return {"weight": torch.ones(rows, columns).to(E4M3), "weight_scale_inv": s}


def model(**layers: Tensors) -> Tensors:
    """In the keyword, __ stands for a dot."""
    return {
        f"{module.replace('__', '.')}.{name}": tensor
        for module, tensors in layers.items()
        for name, tensor in tensors.items()
    }


def test_one_arbitrary_shard_keeps_the_fused_layer(tmp_path: Path) -> None:
    layers = {
        "mlp__gate_proj": linear(),
        "mlp__up_proj": linear(256, 300, noise=True),
        "mlp__down_proj": linear(scale=C),
        "mlp__experts__0__gate_proj": linear(),
        "mlp__experts__1__up_proj": linear(256, 300, noise=True),
        "mlp__experts__0__down_proj": linear(),
    }
    report = inspect(write(tmp_path, model(**layers)))
    served = {tensor.name.removesuffix("_proj.weight"): tensor.served for tensor in report.tensors}
    assert served == {
        "mlp.gate": "float32 kept",
        "mlp.up": "float32 kept",
        "mlp.down": "bytes and c",
        "mlp.experts.0.gate": "float32 kept",
        "mlp.experts.1.up": "float32 kept",
        "mlp.experts.0.down": "bytes",
    }
    # What the others are by themselves does not change.
    assert one(report, "mlp.gate_proj.weight").kind == "pow2"


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


def test_tensor_parallel_sizes_that_cut_blocks(tmp_path: Path) -> None:
    layer = "model__layers__0__"
    layers = {
        f"{layer}mlp__gate_proj": linear(1536),
        f"{layer}mlp__up_proj": linear(1536),
        f"{layer}mlp__down_proj": linear(128, 1536),
        f"{layer}mlp__experts__0__gate_proj": linear(192),
        f"{layer}mlp__experts__0__down_proj": linear(128, 192),
        f"{layer}self_attn__q_proj": linear(1024),
        f"{layer}self_attn__k_proj": linear(256),
        f"{layer}self_attn__v_proj": linear(256),
        f"{layer}self_attn__q_a_proj": linear(192),
        "other": linear(192),
    }
    config = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 1}
    report = inspect(write(tmp_path, model(**layers), config=config))
    assert report.servable
    found = {tensor.name.split(".", 3)[-1]: tensor.cuts for tensor in report.tensors}
    # 1536 / 8 = 192 = 1.5 blocks, and so on down
    rows = {8: (64, 128), 16: (32, 128), 32: (16, 128)}
    assert found["mlp.gate_proj.weight"] == found["mlp.up_proj.weight"] == rows
    too_fine = "refused: groups of 16 columns, at least 32 are needed"
    assert found["mlp.down_proj.weight"] == {8: (128, 64), 16: (128, 32), 32: too_fine}
    # The boundary between gate and up cuts a block without any parallelism.
    w13, w2 = (found[f"mlp.experts.0.{name}_proj.weight"] for name in ("gate", "down"))
    assert w13[1] == (64, 128) and 1 not in w2
    assert w13[2] == (32, 128) and w2[2] == (128, 32)
    assert w13[4] == w2[4] == too_fine
    # Two key-value heads of 128 rows are repeated from four ranks on; eight heads end at eight.
    k = found["self_attn.k_proj.weight"]
    assert set(k) == {16, 32} and k[16] == "refused: 8 attention heads do not divide by 16"
    assert found["self_attn.q_a_proj.weight"] == {}
    assert one(report, "other.weight").cuts == {}
    row = next(line.split() for line in show.text(report).splitlines() if "128x32" in line)
    assert row == ["model.layers.*.mlp.down_proj.weight", *"---", "128x64", "128x32", "refused"]


def test_converted_checkpoints_are_servable(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", linears())
    for dtype in ("float32", "uint8", "float8_e8m0fnu"):
        convert(tmp_path / "a", tmp_path / dtype, scale_dtype=dtype)
        report = inspect(tmp_path / dtype)
        assert report.servable and {t.kind for t in report.tensors} == {"pow2"}
    assert not inspect(tmp_path / "a").servable


def test_table_folds_and_shows_what_is_odd(tmp_path: Path) -> None:
    layers = {f"model__layers__{i}__self_attn__o_proj": linear() for i in range(12)}
    layers["model__layers__5__self_attn__o_proj"] = linear(scale=C)
    report = inspect(write(tmp_path, model(**layers)))
    lines = show.text(report).splitlines()
    rows = [line.split() for line in lines[: lines.index("", 2)] if "o_proj" in line]
    assert [row[:2] for row in rows] == [
        ["model.layers.*.self_attn.o_proj.weight", "11"],
        ["model.layers.5.self_attn.o_proj.weight", "1"],
    ]
    assert "c = 1.32287562" in lines[4]
    everything = show.text(report, everything=True)
    assert all(f"model.layers.{i}.self_attn.o_proj.weight" in everything for i in range(12))


def test_names_that_no_terminal_prints(tmp_path: Path) -> None:
    raw = {"\ud800.weight": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    text = json.dumps(raw).encode()
    data = len(text).to_bytes(8, "little") + text + b"\0"
    (tmp_path / "model.safetensors").write_bytes(data)
    assert "\\ud800.weight" in show.text(inspect(tmp_path))


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(MODEL)]) == 0
    out = capsys.readouterr().out
    assert "--quantization ue8m0 serves this checkpoint: 72 bytes, 23 unquantized" in out
    assert len(out.splitlines()) < 80
    assert main(["inspect", str(MODEL), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["servable"] is True
    bad = write(tmp_path / "bad", fp8_model(torch.full((3, 3), torch.nan)))
    assert main(["inspect", str(bad), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["servable"] is False and data["problems"][0]["tensor"] == "a.weight_scale_inv"
    assert main(["inspect", str(bad)]) == 1
    assert "does not serve this checkpoint" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("vllm-ue8m0 inspect: ")


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for suffix, start in ((".svg", b"<?xml"), (".png", b"\x89PNG")):
        file = tmp_path / f"p{suffix}"
        assert main(["inspect", str(MODEL), "--plot", str(file)]) == 0
        assert file.read_bytes().startswith(start)
    assert "2^k (288)" in (tmp_path / "p.svg").read_text()
    capsys.readouterr()
    for name, words in (("p.gif", "ends in .svg, .png, .pdf"), ("no/p.svg", "no directory")):
        assert main(["inspect", str(MODEL), "--plot", str(tmp_path / name)]) == 1
        captured = capsys.readouterr()
        assert words in captured.err and captured.out == ""


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["inspect", str(MODEL), "--plot", "p.svg"]) == 1
    assert 'pip install "vllm_ue8m0[bench]"' in capsys.readouterr().err


PEAK = """
import json, resource, sys, time
start = time.monotonic()
from vllm_ue8m0 import inspect
report = inspect(sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
found = {"seconds": time.monotonic() - start, "peak": peak, "servable": report.servable}
print(json.dumps({**found, **report.total()["served"]}))
"""


def measure(directory: Path) -> dict[str, float]:
    command = [sys.executable, "-c", PEAK, str(directory)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_whole_of_v31(tmp_path: Path) -> None:
    assert synthetic_v31.write(tmp_path) == 91_991
    found = measure(tmp_path)
    print(f"{found['seconds']:.1f} s, {found['peak'] / 2**20:.0f} MiB")
    assert found["servable"] and found["bytes"] == 45_746 and found["bytes and c"] == 62
    assert found["peak"] < 2**30 and found["seconds"] < 60
