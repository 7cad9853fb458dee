"""`verify`: equality by value across formats and shards, errors, and what is on one side only."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    BLOCK_FP8,
    E4M3,
    E8M0,
    fp8_model,
    linears,
    write_checkpoint,
    write_headers_only,
)

from vllm_ue8m0 import convert, verify
from vllm_ue8m0.checkpoint import verify as module
from vllm_ue8m0.checkpoint.shards import CheckpointError
from vllm_ue8m0.checkpoint.verify import Comparison, Difference, text
from vllm_ue8m0.cli import main
from vllm_ue8m0.codec import convert_scale_to_ue8m0
from vllm_ue8m0.layouts import expand

MODEL = Path(__file__).parents[1] / "fixtures/tiny_deepseek"
C = 1.3228756189346313


def one(found: Comparison, name: str = "a.weight") -> Difference:
    return next(tensor for tensor in found.tensors if tensor.name == name)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of these tests takes several pieces."""
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 128 * 257)


def test_trained_fixture_equals_its_bf16_and_its_other_storages(tmp_path: Path) -> None:
    convert(MODEL, tmp_path / "bf16", to="bf16")
    convert(MODEL, tmp_path / "bytes", scale_dtype="uint8", max_shard_bytes=500_000)
    for a, b in ((MODEL, "bf16"), (MODEL, "bytes"), (tmp_path / "bf16", "bytes")):
        found = verify(a, tmp_path / b)
        assert found.equal and found.passed and len(found.tensors) == 95
        assert {(t.max_error, t.relative_error) for t in found.tensors} == {(0.0, 0.0)}
    assert one(found, "lm_head.weight").a_format == "BF16"
    assert {t.b_format for t in found.tensors if "proj" in t.name and "eh" not in t.name} == {
        "F8_E4M3 / U8"
    }


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "scale", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, E8M0])
def test_scale_names_and_storages_do_not_matter(
    tmp_path: Path, suffix: str, dtype: torch.dtype
) -> None:
    tensors = fp8_model()
    a = write_checkpoint(tmp_path / "a", tensors)
    scale = tensors.pop("a.weight_scale_inv")
    byte = convert_scale_to_ue8m0(scale)
    stored = {torch.uint8: byte, E8M0: byte.view(E8M0)}.get(dtype)
    b = write_checkpoint(
        tmp_path / "b", tensors, {f"a.{suffix}": scale.to(dtype) if stored is None else stored}
    )
    assert verify(a, b).equal and verify(b, a).equal


def test_one_unit_in_one_scale_or_code_is_seen(tmp_path: Path) -> None:
    scale = torch.tensor(C) * 2.0 ** torch.randint(-16, -8, (3, 3))
    tensors = fp8_model(scale)
    a = write_checkpoint(tmp_path / "a", tensors)
    other = scale.clone()
    other[2, 2] = torch.nextafter(scale[2, 2], torch.tensor(1.0))
    b = write_checkpoint(tmp_path / "b", {**tensors, "a.weight_scale_inv": other})
    found = one(verify(a, b))
    assert not found.equal
    values = tensors["a.weight"].double() * expand(scale.double(), 300, 257, (128, 128))
    gap = tensors["a.weight"].double() * expand(other.double(), 300, 257, (128, 128)) - values
    assert found.max_error == float(gap.abs().max())
    assert found.relative_error == pytest.approx(float(gap.norm() / values.norm()), rel=1e-9)
    assert 0 < found.relative_error < 1e-7
    codes = tensors["a.weight"].clone()
    codes.view(torch.uint8)[299, 256] ^= 1
    c = write_checkpoint(tmp_path / "c", {**tensors, "a.weight": codes})
    found = verify(a, c)
    assert [t.name for t in found.tensors if not t.equal] == ["a.weight"]
    assert not found.passed and verify(a, c, tolerance=1.0).passed
    assert not verify(a, c, tolerance=one(found).relative_error / 2).passed
    assert verify(a, c, tolerance=one(found).relative_error).passed


def test_same_values_in_other_codes_are_equal(tmp_path: Path) -> None:
    codes = torch.tensor([[1.0, -2.0], [0.0, 4.0]]).to(E4M3)
    halved = torch.tensor([[0.5, -1.0], [-0.0, 2.0]]).to(E4M3)
    a = {"a.weight": codes, "a.weight_scale_inv": torch.tensor([[C]])}
    b = {"a.weight": halved, "a.weight_scale_inv": torch.tensor([[2 * C]])}
    assert verify(write_checkpoint(tmp_path / "a", a), write_checkpoint(tmp_path / "b", b)).equal


@pytest.mark.parametrize("nan", [True, False])
@pytest.mark.parametrize("scale", [0.25, C])
def test_all_codes_against_the_library(tmp_path: Path, scale: float, nan: bool) -> None:
    code = torch.arange(256, dtype=torch.uint8)
    code = (code if nan else code[(code & 0x7F) != 0x7F])[None].view(E4M3)
    wide = torch.float64
    a = {"a.weight": code, "a.weight_scale_inv": torch.full((1, 2), scale)}
    b = {"a.weight": code.to(wide) * torch.tensor(scale).to(wide)}
    left, right = write_checkpoint(tmp_path / "a", a), write_checkpoint(tmp_path / "b", b)
    assert verify(left, right).equal and verify(right, left).equal
    for i in (1, 7, 8, 126, 129, 200):
        value = b["a.weight"][0, i].clone()
        b["a.weight"][0, i] = torch.nextafter(value, torch.tensor(9.0, dtype=wide))
        found = one(verify(left, write_checkpoint(tmp_path / "c", b)))
        gap = float((b["a.weight"][0, i] - value).abs())
        assert not found.equal and found.max_error == gap and found.relative_error < 1e-15
        b["a.weight"][0, i] = value


def test_rounding_to_bf16_is_a_difference_of_its_size(tmp_path: Path) -> None:
    scale = torch.tensor(C) * 2.0 ** torch.randint(-16, -8, (3, 3))
    a = write_checkpoint(tmp_path / "a", fp8_model(scale), quantization=BLOCK_FP8)
    convert(a, tmp_path / "bf16", to="bf16")
    found = one(verify(a, tmp_path / "bf16"))
    assert not found.equal and 0 < found.relative_error < 2**-8


def test_quantizing_costs_what_it_costs(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", linears())
    convert(a, tmp_path / "b")
    found = verify(a, tmp_path / "b")
    assert not found.passed and verify(a, tmp_path / "b", tolerance=0.04).passed
    assert found.only_in_a == found.only_in_b == []


def test_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {
        f"{dtype}.{i}": torch.ones(shape).to(dtype)
        for dtype in (torch.bool, torch.int64, torch.float64, torch.complex64, E4M3, E8M0)
        for i, shape in enumerate(((), (0,), (3,), (2, 0), (2, 3, 4)))
    }
    tensors["nan"] = torch.tensor([math.nan, 1.0])
    a = write_checkpoint(tmp_path / "a", tensors)
    assert verify(a, write_checkpoint(tmp_path / "b", tensors)).equal
    big = {"torch.int64.2": torch.tensor([2**62, 1, 1]), "x": torch.ones(1)}
    bigger = {"torch.int64.2": torch.tensor([2**62 + 1, 1, 1]), "y": torch.ones(1)}
    found = verify(write_checkpoint(tmp_path / "c", big), write_checkpoint(tmp_path / "d", bigger))
    assert not one(found, "torch.int64.2").equal  # float64 cannot tell them apart
    assert (found.only_in_a, found.only_in_b) == (["x"], ["y"])


def test_nan_on_one_side_shapes_and_zeros(tmp_path: Path) -> None:
    a = {"n": torch.ones(3), "s": torch.ones(2, 3), "z": torch.zeros(2)}
    b = {"n": torch.tensor([1.0, math.nan, 1.0]), "s": torch.ones(3, 2), "z": torch.ones(2)}
    left, right = write_checkpoint(tmp_path / "a", a), write_checkpoint(tmp_path / "b", b)
    found = verify(left, right)
    errors = {t.name: (t.equal, t.max_error, t.relative_error) for t in found.tensors}
    assert errors == {
        "n": (False, math.inf, math.inf),
        "s": (False, math.inf, math.inf),
        "z": (False, 1.0, math.inf),
    }
    assert not verify(left, right, tolerance=1e9).passed
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["tensors"][0]["equal"] is False


def test_refusals(tmp_path: Path) -> None:
    tensors = fp8_model()
    a = write_checkpoint(tmp_path / "a", tensors)
    del tensors["a.weight_scale_inv"]
    b = write_checkpoint(tmp_path / "b", tensors)
    with pytest.raises(CheckpointError, match=r"a\.weight is F8_E4M3 .* without a scale"):
        verify(a, b)
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match="tolerance"):
            verify(a, a, tolerance=bad)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(MODEL / "model.safetensors")
    for name in [name for name in tensors if name.endswith("o_proj.weight_scale_inv")]:
        tensors[name] = tensors[name] * 1.25
    del tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors")
    assert main(["verify", str(MODEL), str(MODEL)]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith("95 tensors are equal, 0 differ.\n") and "100%" in captured.err
    assert main(["verify", str(MODEL), str(other), "--tolerance", "0.5"]) == 1
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if "o_proj" in line)
    assert row[:2] == ["model.layers.*.self_attn.o_proj.weight", "3"] and row[-1] == "0.25"
    assert "1 tensors are in A only: model.norm.weight" in out
    assert main(["verify", str(MODEL), str(other), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["equal"] is data["passed"] is False and len(data["tensors"]) == 94
    assert "lm_head.weight" in text(verify(MODEL, MODEL), everything=True)


PEAK = r"""
import re, sys
import torch
from vllm_ue8m0.checkpoint.verify import verify
def peak():
    # Not getrusage: its ru_maxrss begins with the size of the parent process, which hides growth.
    return int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1])
before = peak()
assert not verify(*sys.argv[1:]).equal
print(peak() - before)
"""


def test_memory_does_not_grow_with_tensors(tmp_path: Path) -> None:
    for name, dtype, width in (("a", "BF16", 2), ("b", "F32", 4)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "model.safetensors"
        write_headers_only(path, {"w": (dtype, (20_000, 8192), 20_000 * 8192 * width)})
        with open(path, "r+b") as file:
            file.seek(-4, 2)
            file.write(bytes([0, 0, 128, 63]) if name == "a" else bytes(4))
    command = [sys.executable, "-c", PEAK, str(tmp_path / "a"), str(tmp_path / "b")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown * 1024 < 200e6  # the tensors are 327 and 655 MB
