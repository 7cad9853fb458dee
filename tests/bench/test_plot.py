"""Plots: files that hold every operator and series, and refusals before anything is measured."""

import sys
from pathlib import Path

import pytest
from recorded import RECORDS, record

from vllm_ue8m0.bench import BenchError, plot


def test_svg_shows_every_operator_and_series(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.svg"
    plot.save(RECORDS, path)
    text = path.read_text()
    for words in (
        "act_quant, K=7168, ue8m0 row_major",  # the three M as lines
        "act_quant, other cases",
        "weight_quant, all cases",
        "rms_norm_quant, all cases",
        "N=36864 K=7168 ue8m0 (100.0\N{NO-BREAK SPACE}us)",
        "ours",
        "vllm",
        "copy of as many bytes",
        "empty kernel",
        "Test GPU, 2026-11-22",
    ):
        assert f">{words}<" in text or words in text, words


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".PDF", b"%PDF")])
def test_other_formats(tmp_path: Path, suffix: str, magic: bytes):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"results{suffix}"
    plot.save(RECORDS[:1], path)
    assert path.read_bytes().startswith(magic)


def test_lines_need_three_sizes():
    over_m = [record(M=M) for M in (64, 1, 16)]
    two = [record(M=M, scale="fp32") for M in (1, 16)]
    (title, group, draw), (rest_title, rest, rest_draw) = plot._panels([*over_m, *two])
    assert (title, draw) == ("act_quant, K=7168, ue8m0 row_major", plot._draw_over_m)
    assert [r.M for r in group] == [1, 16, 64]
    assert (rest_title, rest, rest_draw) == ("act_quant, other cases", two, plot._draw_rows)


def test_other_sizes_are_other_lines():
    records = [record(M=M, K=K) for K in (512, 1024) for M in (1, 2, 3)]
    titles = [title for title, _, _ in plot._panels(records)]
    assert titles == ["act_quant, K=512, ue8m0 row_major", "act_quant, K=1024, ue8m0 row_major"]


def test_missing_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BenchError, match=r'pip install "vllm_ue8m0\[bench\]"'):
        plot.check(tmp_path / "results.svg")


def test_unwritable_names_are_refused(tmp_path: Path):
    with pytest.raises(BenchError, match=r"ends in \.svg, \.png, \.pdf"):
        plot.check(tmp_path / "results.jsonl")
    with pytest.raises(BenchError, match="there is no directory"):
        plot.check(tmp_path / "missing" / "results.svg")
