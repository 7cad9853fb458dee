"""Conversion: numbers against an independent oracle, layout, files, and memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import (
    BLOCK_FP8,
    DTYPES,
    E4M3,
    E8M0,
    fp8_model,
    linears,
    read_all,
    same_bits,
    write_checkpoint,
)

from vllm_ue8m0.checkpoint import steps
from vllm_ue8m0.checkpoint.convert import DEFAULT_IGNORE, convert
from vllm_ue8m0.checkpoint.shards import INDEX_NAME, open_checkpoint
from vllm_ue8m0.reference import weight_quant


def model() -> dict[str, torch.Tensor]:
    """Linears, and everything that stays as it is."""
    return linears() | {
        "model.embed_tokens.weight": torch.randn(50, 64).bfloat16(),
        "lm_head.weight": torch.randn(50, 64).bfloat16(),
        "model.layers.0.mlp.gate.weight": torch.randn(4, 64).bfloat16(),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(4),
        "model.layers.0.input_layernorm.weight": torch.randn(64).bfloat16(),
        "model.layers.0.mlp.up_proj.bias": torch.randn(64).bfloat16(),
        "model.layers.1.eh_proj.weight": torch.randn(64, 128).bfloat16(),
        "model.layers.1.conv1d.weight": torch.randn(64, 1, 4).bfloat16(),
        "model.rotary.inv_freq": torch.randn(3, 3),
    }


def block_values(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    full = scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return full[:rows, :columns]


def e4m3_values() -> torch.Tensor:
    """The 253 finite values of e4m3fn, by its definition: bias 7, subnormals, no infinity."""
    magnitudes = [m / 8 * 2.0**-6 for m in range(8)]
    magnitudes += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
    return torch.tensor(sorted({-m for m in magnitudes} | set(magnitudes)), dtype=torch.float64)


@pytest.mark.parametrize("scale_dtype", ["float32", "uint8", "float8_e8m0fnu"])
def test_quantized_numbers(tmp_path: Path, scale_dtype: str) -> None:
    """Scales are the smallest powers of two that hold the block; codes are the nearest e4m3."""
    source = linears()
    convert(write_checkpoint(tmp_path / "a", source), tmp_path / "b", scale_dtype=scale_dtype)
    result, grid = read_all(tmp_path / "b"), e4m3_values()
    assert len(result) == 2 * len(source)
    for name, w in source.items():
        codes, stored = result[name], result[name + "_scale_inv"]
        assert codes.dtype == E4M3 and codes.shape == w.shape
        assert stored.dtype == getattr(torch, scale_dtype)
        if scale_dtype != "float32":
            stored = 2.0 ** (stored.view(torch.uint8).double() - 127)
        N, K = w.shape
        assert stored.shape == (math.ceil(N / 128), math.ceil(K / 128))
        for i in range(stored.shape[0]):
            for j in range(stored.shape[1]):
                block = w[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].double()
                exponent = math.ceil(math.log2(float(block.abs().max()) / 448))
                assert float(stored[i, j]) == 2.0**exponent, (name, i, j)
        scaled = w.double() / block_values(stored, N, K)
        above = torch.searchsorted(grid, scaled).clamp(1, len(grid) - 1)
        best = torch.minimum((scaled - grid[above - 1]).abs(), (scaled - grid[above]).abs())
        assert torch.equal((scaled - codes.double()).abs(), best), name


def test_tiny_and_zero_blocks(tmp_path: Path) -> None:
    """No amax floor: a block at 1e-30 keeps three mantissa bits, a zero block stays zero."""
    w = torch.zeros(256, 256)
    w[:128, :128] = torch.randn(128, 128) * 1e-30
    convert(write_checkpoint(tmp_path / "a", {"x.weight": w}), tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", to="bf16")
    result = read_all(tmp_path / "c")["x.weight"].float()
    assert torch.equal(result[128:], w[128:]) and torch.equal(result[:, 128:], w[:, 128:])
    large = w.abs() > 1e-31
    assert float((result / w - 1)[large].abs().max()) <= 2**-4


def test_weight_quant_float32_scales() -> None:
    w = torch.zeros(256, 256)
    w[:128, :128] = torch.randn(128, 128)
    w[128:, :128] = 1e-43  # amax / 448 is 0 in float32
    codes, scale = weight_quant(w, ue8m0=False)
    assert scale[0, 1] == scale[1, 1] == 1
    assert scale[1, 0] == 2.0**-126 and not bool(codes[128:].float().any())
    assert scale[0, 0] == w[:128, :128].abs().max() / 448
    assert not bool(codes.float().isnan().any())
    error = (codes.double() * block_values(scale, 256, 256) - w).abs()
    assert float(error[:128].max()) <= 16.001 * float(scale[0, 0])  # half of e4m3's largest step
    untouched = w.clone()
    weight_quant(w)
    assert torch.equal(w, untouched)


def test_what_is_left_unquantized(tmp_path: Path) -> None:
    source = model()
    summary = convert(write_checkpoint(tmp_path / "a", source), tmp_path / "b")
    result = read_all(tmp_path / "b")
    quantized = {name for name in source if result[name].dtype == E4M3}
    assert quantized == set(linears())
    assert all(same_bits(result[name], source[name]) for name in source.keys() - quantized)
    assert (summary.converted, summary.copied) == (len(quantized), len(source) - len(quantized))
    assert summary.bytes_read == sum(t.nbytes for t in source.values())
    assert summary.bytes_written == sum(t.nbytes for t in result.values())


def test_config(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "a", model()), tmp_path / "b", quant_method="ue8m0")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config == {
        "model_type": "llama",
        "hidden_size": 576,
        "quantization_config": {
            **BLOCK_FP8,
            "quant_method": "ue8m0",
            "scale_fmt": "ue8m0",
            "modules_to_not_convert": [
                "lm_head",
                "model.layers.0.mlp.gate",
                "model.layers.1.eh_proj",
            ],
        },
    }
    convert(write_checkpoint(tmp_path / "c", linears()), tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["quantization_config"] == {**BLOCK_FP8, "scale_fmt": "ue8m0"}


def test_ignore_patterns(tmp_path: Path) -> None:
    ignore = (*DEFAULT_IGNORE, "*.layers.[13].*")
    convert(write_checkpoint(tmp_path / "a", linears()), tmp_path / "b", ignore=ignore)
    result = read_all(tmp_path / "b")
    kept = [name.split(".")[2] for name, t in result.items() if t.dtype in DTYPES[:2]]
    assert sorted(kept) == ["1", "3"]


def test_shards_and_determinism(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards hold the same tensors; how a tensor is cut into pieces changes no byte."""
    source = write_checkpoint(tmp_path / "a", model(), {"z.weight": torch.randn(640, 130)})
    convert(source, tmp_path / "b", max_shard_bytes=200_000)
    for name in ("_CHUNK_ELEMENTS", "_COPY_BYTES"):
        monkeypatch.setattr(steps, name, 1000)
    convert(source, tmp_path / "c", max_shard_bytes=200_000)
    files = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "c").iterdir())
    for name in files:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name

    monkeypatch.undo()
    convert(source, tmp_path / "d")
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    one, many = read_all(tmp_path / "d"), read_all(tmp_path / "b")
    assert one.keys() == many.keys()
    assert all(same_bits(one[name], many[name]) for name in one)

    index = json.loads((tmp_path / "b" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    weight_map = index["weight_map"]
    assert set(weight_map) == set(one) and len(set(weight_map.values())) > 2
    for name in weight_map:
        if name.endswith("_scale_inv"):
            assert weight_map[name] == weight_map[name.removesuffix("_scale_inv")]
    for info in open_checkpoint(tmp_path / "b").tensors.values():
        # torch refuses to view bytes as a wider type at an odd offset.
        assert info.start % 4 == 0 or info.dtype in ("BF16", "F16", "F8_E4M3")
        assert info.start % 2 == 0 or info.dtype == "F8_E4M3"


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "scale", "weight_scale"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, E8M0, torch.uint8])
def test_exact_scales_are_kept(tmp_path: Path, stored: torch.dtype, suffix: str) -> None:
    tensors = fp8_model()
    scale = tensors.pop("a.weight_scale_inv")
    container = scale.to(E8M0 if stored.itemsize == 1 else stored)
    container = container.view(stored) if stored == torch.uint8 else container
    source = write_checkpoint(
        tmp_path / "a", tensors, {f"a.{suffix}": container},
        quantization={**BLOCK_FP8, "ignored_layers": ["b"]},
    )  # fmt: skip
    convert(source, tmp_path / "b", scale_dtype="uint8")
    result = read_all(tmp_path / "b")
    assert same_bits(result["a.weight"], tensors["a.weight"])
    # A model that is FP8 already left out what it left out.
    assert same_bits(result["b.weight"], tensors["b.weight"])
    stored_scale = result["a.weight_scale_inv"]  # whatever the source calls it
    assert len(result) == 3 and stored_scale.dtype == torch.uint8
    assert torch.equal(2.0 ** (stored_scale.float() - 127), scale)
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert config == {**BLOCK_FP8, "scale_fmt": "ue8m0", "ignored_layers": ["b"]}


def test_dequantize(tmp_path: Path) -> None:
    scale = torch.rand(3, 3) + 0.1
    tensors = fp8_model(scale)
    convert(
        write_checkpoint(tmp_path / "a", tensors, quantization=BLOCK_FP8), tmp_path / "b", "bf16"
    )
    result = read_all(tmp_path / "b")
    product = tensors["a.weight"].float() * block_values(scale, 300, 257).float()
    assert same_bits(result.pop("a.weight"), product.bfloat16())
    assert same_bits(result.pop("b.weight"), tensors["b.weight"])
    assert not result
    assert "quantization_config" not in json.loads((tmp_path / "b/config.json").read_text())


def test_round_trip_keeps_every_value(tmp_path: Path) -> None:
    """Once quantized, ue8m0 -> bf16 -> ue8m0 -> bf16 loses nothing."""
    convert(write_checkpoint(tmp_path / "a", linears()), tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c", to="bf16")
    convert(tmp_path / "c", tmp_path / "d", scale_dtype="float8_e8m0fnu")
    convert(tmp_path / "d", tmp_path / "e", to="bf16")
    first, second = read_all(tmp_path / "c"), read_all(tmp_path / "e")
    assert first.keys() == second.keys() == linears().keys()
    assert all(same_bits(first[name], second[name]) for name in first)


def test_other_files(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", linears())
    for name in ("tokenizer.json", "sub/chat_template.jinja", "model.bin", ".git/x", "x.gguf"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    convert(source, tmp_path / "b")
    found = {str(p.relative_to(tmp_path / "b")) for p in (tmp_path / "b").rglob("*") if p.is_file()}
    assert found == {
        "config.json", "model.safetensors", "tokenizer.json", "sub/chat_template.jinja"
    }  # fmt: skip
    assert (tmp_path / "b" / "tokenizer.json").read_text() == "tokenizer.json"
