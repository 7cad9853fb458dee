"""Real models through every target, and what transformers makes of the outputs on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import E4M3, read_all, same_bits

from vllm_ue8m0.checkpoint.convert import DEFAULT_IGNORE, convert
from vllm_ue8m0.codec import scale_to_float
from vllm_ue8m0.reference import weight_dequant

FIXTURE = Path(__file__).parents[1] / "fixtures/tiny_deepseek"
PROMPT = torch.tensor([[256, *b"The quick brown fox jumps over the lazy dog"]])


def values(directory: Path) -> dict[str, torch.Tensor]:
    """Every weight as bf16 values, whatever it is stored as."""
    tensors = read_all(directory)
    scales = {name for name in tensors if name.endswith("weight_scale_inv")}
    return {
        name: weight_dequant(t, scale_to_float(tensors[name + "_scale_inv"]))
        if t.dtype == E4M3
        else t
        for name, t in tensors.items()
        if name not in scales
    }


@pytest.mark.parametrize(
    ("to", "scale_dtype", "stored"),
    [
        ("ue8m0", "float32", torch.float32),
        ("ue8m0", "uint8", torch.uint8),
        ("ue8m0", "float8_e8m0fnu", torch.float8_e8m0fnu),
        ("fp32-scales", "float32", torch.float32),
        ("bf16", "float32", None),
    ],
)
def test_trained_fixture(
    tmp_path: Path, to: str, scale_dtype: str, stored: torch.dtype | None
) -> None:
    """No target changes a value of the trained model, and the way back restores its bytes."""
    summary = convert(FIXTURE, tmp_path / "a", to, scale_dtype)
    result, source = values(tmp_path / "a"), values(FIXTURE)
    assert result.keys() == source.keys() and summary.converted > 50
    assert all(same_bits(result[name], source[name]) for name in source)
    tensors = read_all(tmp_path / "a")
    dtypes = {t.dtype for name, t in tensors.items() if name.endswith("weight_scale_inv")}
    assert dtypes == ({stored} if stored else set())
    others = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert others <= {path.name for path in (tmp_path / "a").iterdir()}
    if to != "bf16":
        convert(tmp_path / "a", tmp_path / "b")
        back, original = read_all(tmp_path / "b"), read_all(FIXTURE)
        assert back.keys() == original.keys()
        assert all(same_bits(back[name], original[name]) for name in original)
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        assert config == json.loads((FIXTURE / "config.json").read_text())


def logits(directory: Path) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    loader: Any = transformers.AutoModelForCausalLM
    model, report = loader.from_pretrained(
        directory, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    # transformers has no MTP layer; scales that it did not use would be a different model.
    assert all(name.startswith("model.layers.2.") for name in report["unexpected_keys"])
    with torch.no_grad():
        return model(PROMPT).logits.float()


def test_transformers_loads_bf16(tmp_path: Path) -> None:
    convert(FIXTURE, tmp_path / "a", to="bf16")
    found = logits(tmp_path / "a")[0]
    # It is the trained model: it expects English, not noise.
    loss = torch.nn.functional.cross_entropy(found[:-1, :256], PROMPT[0, 1:])
    assert float(loss) < 4.0


@pytest.mark.parametrize("to", ["ue8m0", "fp32-scales"])
def test_transformers_loads_block_fp8(tmp_path: Path, to: str) -> None:
    """Without a GPU transformers dequantizes on loading: the logits of our own bf16 output.

    transformers 5.19 dequantizes whole blocks only ("not divisible by scale grid", also in
    the source itself), so kv_a_proj_with_mqa, with 576 rows, is left out.
    """
    pytest.importorskip("accelerate")
    convert(FIXTURE, tmp_path / "bf16", to="bf16")
    ignore = (*DEFAULT_IGNORE, "*.kv_a_proj_with_mqa")
    convert(tmp_path / "bf16", tmp_path / "fp8", to, ignore=ignore)
    convert(tmp_path / "fp8", tmp_path / "back", to="bf16")
    assert torch.equal(logits(tmp_path / "fp8"), logits(tmp_path / "back"))
