"""`max_memory`: how many workers it allows, and that the process stays within it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import write_checkpoint

from vllm_ue8m0.checkpoint.convert import convert
from vllm_ue8m0.checkpoint.shards import CheckpointError
from vllm_ue8m0.checkpoint.workers import choose_workers, parse_size

MIB = 1 << 20

# The first conversion loads what torch loads when it is used first.
MEMORY = r"""
import re, sys
from vllm_ue8m0.checkpoint.convert import convert
def resident(name):
    # Not getrusage: its ru_maxrss begins with the size of the parent process.
    return int(re.search(name + r":\s*(\d+) kB", open("/proc/self/status").read())[1])
warm, source, target, to, budget = sys.argv[1:]
convert(warm, warm + "-" + to, to, requantize=True, workers=1)
open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
start = resident("VmRSS")
convert(source, target, to, requantize=True, workers=8, max_memory=int(budget))
print(resident("VmHWM") - start)
"""


def growth(warm: Path, source: Path, target: Path, to: str, budget: int) -> int:
    """Bytes that the resident set of a fresh process grows by at most while it converts."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, (warm, source, target, to, budget))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(result.stdout) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads VmHWM from /proc")
@pytest.mark.parametrize("budget", [150 * MIB, 400 * MIB])
def test_memory_stays_within_the_budget(tmp_path: Path, budget: int) -> None:
    """250 MB of weights in several shapes, with as many of 8 workers as the budget allows."""
    small = {"a.weight": torch.randn(256, 1024).bfloat16(), "embed.weight": torch.ones(1024)}
    write_checkpoint(tmp_path / "warm", small)
    w = torch.randn(1536, 18432).bfloat16()
    large = {
        "a.weight": w, "b.weight": w.view(18432, 1536).clone(), "c.weight": w[:, :999].float(),
        "embed.weight": torch.ones(20 * MIB), "d.weight": w.view(-1, 256)[:49_999].clone(),
    }  # fmt: skip
    write_checkpoint(tmp_path / "a", {name: t.contiguous() for name, t in large.items()})
    # The steps with the most temporaries: bf16 -> float32 scales -> UE8M0, -> bf16.
    found = [growth(tmp_path / "warm", tmp_path / "a", tmp_path / "b", "fp32-scales", budget)]
    fp8 = (tmp_path / "warm-fp32-scales", tmp_path / "b")
    found += [growth(*fp8, tmp_path / to, to, budget) for to in ("ue8m0", "bf16")]
    print([f"{size / MIB:.0f} of {budget / MIB:.0f} MiB" for size in found])
    assert max(found) <= budget
    assert min(found) > 8 * MIB  # it measures something


def test_choose_workers() -> None:
    assert choose_workers(4, None, 0, 20 * MIB) == 4
    assert choose_workers(64, 232 * MIB, 0, 40 * MIB) == 4  # 32 + 4 * 50
    assert choose_workers(64, 231 * MIB, 0, 40 * MIB) == 3
    assert choose_workers(64, 232 * MIB, 50 * MIB, 40 * MIB) == 3
    assert choose_workers(2, 1 << 40, 0, 40 * MIB) == 2
    assert choose_workers(None, None, 0, MIB) >= 1


def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "a", {"a.weight": torch.ones(256, 256)})
    with pytest.raises(CheckpointError, match=r"--max-memory is 1 MiB; .* at least 3\d MiB"):
        convert(source, tmp_path / "b", max_memory=MIB)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 << 30), ("500MB", 500_000_000), ("1.5g", 1_500_000_000), ("64 KiB", 1 << 16),
        ("1048576", MIB), ("7b", 7), ("1TB", 10**12), ("2gi", 2 << 30),
    ],
)  # fmt: skip
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "2 GiB GiB", "1e9", "5PB"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)
