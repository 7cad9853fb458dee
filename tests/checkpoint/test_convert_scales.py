"""What conversion makes of scales: kept, expanded, refused or requantized."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import (
    BLOCK_FP8,
    E4M3,
    E8M0,
    fp8_model,
    linears,
    read_all,
    same_bits,
    write_checkpoint,
)

from vllm_ue8m0.checkpoint import steps
from vllm_ue8m0.checkpoint.convert import convert
from vllm_ue8m0.checkpoint.quantize import quantize_blocks
from vllm_ue8m0.checkpoint.shards import CheckpointError
from vllm_ue8m0.reference import weight_dequant, weight_quant

C = 1.3228756189346313  # of DeepSeek-V3.1's o_proj


def config_of(directory: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((directory / "config.json").read_text())
    quantization = config.get("quantization_config", {})
    assert isinstance(quantization, dict)
    return quantization


def dequantized(directory: Path) -> torch.Tensor:
    tensors = read_all(directory)
    return weight_dequant(
        tensors["a.weight"], tensors["a.weight_scale_inv"], out_dtype=torch.float32
    )


@pytest.mark.parametrize("to", ["ue8m0", "fp32-scales"])
@pytest.mark.parametrize("requantize", [False, True])
def test_factored_scales_stay_byte_for_byte(tmp_path: Path, to: str, requantize: bool) -> None:
    tensors = fp8_model(C * 2.0 ** torch.randint(-16, -8, (3, 3)))
    source = write_checkpoint(tmp_path / "a", tensors, quantization=BLOCK_FP8)
    summary = convert(source, tmp_path / "b", to=to, requantize=requantize)
    result = read_all(tmp_path / "b")
    assert result.keys() == tensors.keys() and not summary.errors
    assert all(same_bits(result[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("scale_dtype", ["uint8", "float8_e8m0fnu"])
def test_factored_scales_do_not_fit_bytes(tmp_path: Path, scale_dtype: str) -> None:
    source = write_checkpoint(tmp_path / "a", fp8_model(torch.full((3, 3), C)))
    words = r"^a\.weight_scale_inv: .* 1\.32\d+ times .*--scale-dtype float32 .*--requantize"
    with pytest.raises(CheckpointError, match=words):
        convert(source, tmp_path / "b", scale_dtype=scale_dtype)
    assert not (tmp_path / "b").exists()
    summary = convert(source, tmp_path / "b", scale_dtype=scale_dtype, requantize=True)
    assert list(summary.errors) == ["a.weight"]
    assert read_all(tmp_path / "b")["a.weight_scale_inv"].dtype == getattr(torch, scale_dtype)


def test_requantized_numbers_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """weight_quant of the dequantized weight; the error is what the files show, at most 2.8 %."""
    monkeypatch.setattr("vllm_ue8m0.checkpoint.steps._CHUNK_ELEMENTS", 1)
    codes, scale = weight_quant(torch.randn(700, 900) * torch.logspace(-3, 3, 900), ue8m0=False)
    source = write_checkpoint(
        tmp_path / "a", {"a.weight": codes, "a.weight_scale_inv": scale}, quantization=BLOCK_FP8
    )
    with pytest.raises(CheckpointError, match=r"^a\.weight_scale_inv: .*--requantize"):
        convert(source, tmp_path / "b")
    summary = convert(source, tmp_path / "b", requantize=True, scale_dtype="uint8")
    result, old = read_all(tmp_path / "b"), dequantized(tmp_path / "a")
    wanted = weight_quant(old)
    assert same_bits(result["a.weight"], wanted[0])
    assert same_bits(result["a.weight_scale_inv"], wanted[1])
    error = (dequantized(tmp_path / "b") - old).double().norm() / old.double().norm()
    assert summary.errors == pytest.approx({"a.weight": float(error)}, rel=1e-12)
    assert 0.01 < summary.errors["a.weight"] <= 0.028
    assert config_of(tmp_path / "b")["scale_fmt"] == "ue8m0"


def test_exact_scales_are_not_requantized(tmp_path: Path) -> None:
    tensors = fp8_model()
    source = write_checkpoint(tmp_path / "a", tensors, quantization=BLOCK_FP8)
    assert not convert(source, tmp_path / "b", requantize=True).errors
    assert same_bits(read_all(tmp_path / "b")["a.weight"], tensors["a.weight"])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, E8M0, torch.uint8])
@pytest.mark.parametrize("suffix", ["weight_scale_inv", "scale", "weight_scale"])
def test_fp32_scales_of_fp8(tmp_path: Path, stored: torch.dtype, suffix: str) -> None:
    tensors = fp8_model()
    scale = tensors.pop("a.weight_scale_inv")
    if stored.itemsize > 1:
        scale = scale.to(stored).float() * 1.25  # arbitrary scales of either width are kept
        scale[0, 0] *= 1.5
    container = scale.to(E8M0 if stored.itemsize == 1 else stored)
    container = container.view(stored) if stored == torch.uint8 else container
    source = write_checkpoint(
        tmp_path / "a", {**tensors, f"a.{suffix}": container},
        quantization={**BLOCK_FP8, "scale_fmt": "ue8m0"},
    )  # fmt: skip
    convert(source, tmp_path / "b", to="fp32-scales")
    result = read_all(tmp_path / "b")
    assert same_bits(result.pop("a.weight_scale_inv"), scale)
    assert result.keys() == tensors.keys()
    assert all(same_bits(result[name], tensors[name]) for name in tensors)
    assert config_of(tmp_path / "b") == BLOCK_FP8
    convert(source, tmp_path / "c", to="fp32-scales", quant_method="ue8m0")
    assert config_of(tmp_path / "c")["scale_fmt"] == "fp32"


def test_fp32_scales_of_float_weights(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", linears())
    convert(source, tmp_path / "b", to="fp32-scales")
    result = read_all(tmp_path / "b")
    for name, w in read_all(source).items():
        codes, scale = weight_quant(w, ue8m0=False)
        assert same_bits(result[name], codes) and same_bits(result[name + "_scale_inv"], scale)
    assert config_of(tmp_path / "b") == BLOCK_FP8
    with pytest.raises(CheckpointError, match="stores float32"):
        convert(source, tmp_path / "c", to="fp32-scales", scale_dtype="uint8")


@pytest.mark.parametrize("factor", [1.0, C])
@pytest.mark.parametrize("to", ["ue8m0", "fp32-scales"])
def test_round_trip_is_exact(tmp_path: Path, factor: float, to: str) -> None:
    """Dequantized values of the result equal the source's, bit for bit, and so do bf16 files."""
    source = write_checkpoint(
        tmp_path / "a", fp8_model(factor * 2.0 ** torch.randint(-20, 20, (3, 3))),
        quantization=BLOCK_FP8,
    )  # fmt: skip
    convert(source, tmp_path / "b", to=to)
    assert same_bits(dequantized(source), dequantized(tmp_path / "b"))
    convert(source, tmp_path / "c", to="bf16")
    convert(tmp_path / "b", tmp_path / "d", to="bf16")
    assert same_bits(read_all(tmp_path / "c")["a.weight"], read_all(tmp_path / "d")["a.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize_blocks_exhaustively(dtype: torch.dtype) -> None:
    """Every value of a 16-bit dtype beside powers of two as the block's largest."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[values.isfinite()]
    info = torch.finfo(dtype)
    # Both ends of either dtype, subnormals and all, and the middle.
    for exponent in (*range(-133, -108, 2), *range(-24, 16), *range(110, 128)):
        top = torch.tensor(2.0**exponent).to(dtype)
        if not 0 < float(top) <= info.max:
            continue
        w = torch.nn.functional.pad(values.clamp(-top, top), (0, -len(values) % 127))
        w = w.view(-1, 127)
        assert_same_as_reference(torch.cat([w, top.expand(len(w), 1)], 1))


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 128), (300, 257), (1000, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ue8m0", [True, False])
def test_quantize_blocks(shape: tuple[int, int], dtype: torch.dtype, ue8m0: bool) -> None:
    spread = (-42, 38) if dtype != torch.float16 else (-7, 4)
    w = torch.randn(shape) * torch.logspace(*spread, shape[1])
    assert_same_as_reference(w.clamp(-1e38, 1e38).to(dtype), ue8m0)


def assert_same_as_reference(w: torch.Tensor, ue8m0: bool = True) -> None:
    found, wanted = quantize_blocks(w, ue8m0), weight_quant(w, ue8m0)
    assert found[0].dtype == E4M3 and found[0].is_contiguous()
    assert same_bits(found[0], wanted[0]) and same_bits(found[1], wanted[1])


@pytest.mark.parametrize(
    ("value", "dtype"),
    [*product([float("nan"), float("inf"), -float("inf")], [torch.bfloat16, torch.float32])],
)
def test_quantize_blocks_refuses(value: float, dtype: torch.dtype) -> None:
    w = torch.randn(200, 300).to(dtype)
    w[199, 299] = value
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize_blocks(w, ue8m0=True)


def test_errors_are_known_before_the_last_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that writes a shard's last byte sums the errors of the others' pieces too."""
    write, seen = steps.Requantize._write, []

    def watched(step: steps.Requantize, shard: object, start: int, *rest: object) -> None:
        seen.append(start in [part[0] for part in step.squares])
        write(step, shard, start, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(steps.Requantize, "_write", watched)
    codes, scale = weight_quant(torch.randn(700, 300), ue8m0=False)
    tensors = {"a.weight": codes, "a.weight_scale_inv": scale}
    source = write_checkpoint(tmp_path / "a", tensors, quantization=BLOCK_FP8)
    convert(source, tmp_path / "b", requantize=True)
    assert seen and all(seen)
