"""What conversion refuses, with which words, and that nothing is left behind."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_checkpoints import BLOCK_FP8, E4M3, fp8_model, linears, read_all, write_checkpoint

from vllm_ue8m0.checkpoint.convert import convert
from vllm_ue8m0.checkpoint.shards import CheckpointError, open_checkpoint
from vllm_ue8m0.checkpoint.writer import ShardWriter
from vllm_ue8m0.formats import ConfigError

ONES = torch.ones(3, 3)


def with_entry(value: float) -> torch.Tensor:
    scale = ONES.clone()
    scale[1, 2] = value
    return scale


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (with_entry(0.3), "are not powers of two"),
        (with_entry(2.0**-127), "are not powers of two between 2"),
        (with_entry(0.0), r"block \[1, 2\] is 0\.0 \(1 such"),
        (with_entry(-1.0), r"block \[1, 2\] is -1\.0"),
        (with_entry(math.inf), r"block \[1, 2\] is inf"),
        (with_entry(math.nan), r"block \[1, 2\] is nan"),
        (torch.full((3, 3), 255, dtype=torch.uint8), r"block \[0, 0\] is nan \(9 such"),
    ],
)
def test_scales_without_exact_bytes_are_refused(
    tmp_path: Path, scale: torch.Tensor, message: str
) -> None:
    source = write_checkpoint(tmp_path / "a", fp8_model(scale), quantization=BLOCK_FP8)
    with pytest.raises(CheckpointError, match=rf"^a\.weight_scale_inv: .*{message}"):
        convert(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("stored", [torch.float32, torch.uint8])
def test_zero_scale_over_zero_weights(tmp_path: Path, stored: torch.dtype) -> None:
    tensors = fp8_model(torch.full((3, 3), 127 if stored == torch.uint8 else 1.0, dtype=stored))
    tensors["a.weight"][128:256, 256:] = -0.0
    tensors["a.weight_scale_inv"][1, 2] = 0
    convert(write_checkpoint(tmp_path / "a", tensors, quantization=BLOCK_FP8), tmp_path / "b")
    scale = read_all(tmp_path / "b")["a.weight_scale_inv"]
    assert torch.equal(scale, with_entry(2.0**-126))


@pytest.mark.parametrize("to", ["ue8m0", "bf16"])
def test_nan_codes_are_refused(tmp_path: Path, to: str) -> None:
    tensors = fp8_model()
    tensors["a.weight"].view(torch.uint8)[299, 256] = 0xFF
    source = write_checkpoint(tmp_path / "a", tensors, quantization=BLOCK_FP8)
    with pytest.raises(CheckpointError, match=r"^a\.weight holds NaN codes"):
        convert(source, tmp_path / "b", to=to)


def test_scales_that_overflow_bf16_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", fp8_model(with_entry(2.0**120)))
    with pytest.raises(CheckpointError, match=r"largest scale is 1\.329"):
        convert(source, tmp_path / "b", to="bf16")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_weights_are_refused(tmp_path: Path, value: float) -> None:
    tensors = linears()
    tensors["model.layers.1.mlp.up_proj.weight"][191, 575] = value
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        convert(write_checkpoint(tmp_path / "a", tensors), tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


REFUSED_SOURCES = {
    "all experts in one tensor": {"m.experts.up.weight": torch.ones(2, 128, 128)},
    "2-D float weight to quantize": {"model.norm.weight": torch.ones(8)},
    "without a scale": {"a.weight": torch.ones(8, 8).to(E4M3)},
    "handles 2-D tensors": {"a.weight": torch.ones(2, 8, 8).to(E4M3), "b.weight": torch.ones(8, 8)},
}


@pytest.mark.parametrize("message", REFUSED_SOURCES)
def test_refused_sources(tmp_path: Path, message: str) -> None:
    source = write_checkpoint(tmp_path / "a", REFUSED_SOURCES[message])
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "b")


def test_refused_configs(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", linears(), quantization={"quant_method": "gptq"})
    with pytest.raises(ConfigError, match="gptq"):
        convert(source, tmp_path / "b")
    other = {**BLOCK_FP8, "weight_block_size": [32, 32]}
    with pytest.raises(ConfigError, match="weight_block_size"):
        convert(write_checkpoint(tmp_path / "c", fp8_model(), quantization=other), tmp_path / "b")
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        convert(source, tmp_path / "b")
    for wrong in ({"to": "int8"}, {"scale_dtype": "bf16"}, {"quant_method": "awq"}):
        with pytest.raises(ValueError, match="allowed: "):
            convert(source, tmp_path / "b", **wrong)


def test_refused_destinations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "a", linears())
    for target in (source, source / "b", tmp_path, tmp_path / "a" / ".." / "a"):
        with pytest.raises(CheckpointError, match="lies in the source"):
            convert(source, target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match="not an empty directory"):
            convert(source, tmp_path / name)
    assert (tmp_path / "full" / "precious").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000))
    with pytest.raises(CheckpointError, match=r"needs 0\.00 GB, but only"):
        convert(source, tmp_path / "deep" / "b")
    assert not (tmp_path / "deep").exists()


def test_unfinished_shard_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(OSError, match="disk"), ShardWriter(path, {"a": ("U8", (4,))}) as shard:
        shard.write("a", b"12")
        raise OSError("disk")
    assert list(tmp_path.iterdir()) == []
    with ShardWriter(path, {"a": ("U8", (4,))}) as shard:
        shard.write("a", b"34", 2)
        shard.write("a", b"12")
        assert not path.exists()
    assert bytes(open_checkpoint(tmp_path).load("a").tolist()) == b"1234"
