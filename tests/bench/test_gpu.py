"""`bench quant`, `gemm` and `moe` with --quick, and `tune`, for real."""

import json
from pathlib import Path
from time import perf_counter

import pytest
import torch

from vllm_ue8m0.bench.candidates import ROWS as TUNED
from vllm_ue8m0.bench.records import read
from vllm_ue8m0.bench.timing import ROUNDS, WARM_ROUNDS, CudaClock, Timing
from vllm_ue8m0.cli import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a CUDA device"),
]


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "results.jsonl"
    assert main(["bench", "quant", "--quick", "--out", str(path)]) == 0
    captured = capsys.readouterr()
    assert "[8/8] weight_dequant" in captured.err
    records = read(path)
    assert len(records) == 8
    for record in records:
        assert 0.5 < record.ours_us < 10_000
        # A copy that beat memory by far would have been measured in the cache.
        if record.num_bytes > 1e8:
            assert record.num_bytes / record.limit_us < 10e6  # 10 TB/s
        assert ("empty" in record.context_us) == (record.M == 16)
    assert main(["bench", "show", str(path)]) == 0
    assert capsys.readouterr().out == captured.out


def test_quick_products(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "results.jsonl"
    only = ["prefill_gemm", "middle_gemm", "decode_gemm"]  # FlashInfer compiles for two minutes
    assert main(["bench", "gemm", "--quick", "--only", *only, "--out", str(path)]) == 0
    assert "[6/6] decode_gemm" in capsys.readouterr().err
    records = read(path)
    assert [record.bench for record in records] == [bench for bench in only for _ in range(2)]
    for record in records:
        assert 1.0 < record.ours_us < 10_000
        assert 0.5 < record.roof["tb_per_s"] < 10 and 50 < record.roof["tflops"] < 10_000
        # Faster than the roof by far would have been measured in the cache, or not at all.
        assert record.limit_us < 1.1 * record.ours_us


def test_quick_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "results.jsonl"
    only = ["tp8_uniform", "ep8_uniform"]  # 1.4 GB of weights each
    assert main(["bench", "moe", "--quick", "--only", *only, "--out", str(path)]) == 0
    assert "[4/4] moe_layer M=2048" in capsys.readouterr().err
    records = read(path)
    assert [(r.variant["parallel"], r.M) for r in records] == [
        (parallel, M) for parallel in ("TP8", "EP8") for M in (1, 2048)
    ]
    for record in records:
        assert 1.0 < record.ours_us < 100_000
        assert record.limit_us < 1.1 * record.ours_us


def test_single_launches_are_counted_and_take_no_launch_time():
    count = torch.zeros((), dtype=torch.int32, device="cuda")

    def slow_to_launch(i: int):
        end = perf_counter() + 100e-6
        while perf_counter() < end:
            pass
        count.add_(1)

    times = CudaClock().measure_single({"slow": slow_to_launch})
    assert int(count) == 1 + WARM_ROUNDS + ROUNDS
    assert times["slow"].time_us < 50


def test_a_graph_makes_every_call_on_the_next_buffer():
    counts = torch.zeros(4, dtype=torch.int32, device="cuda")

    def call(i: int):
        counts[i] += 1
        return torch.empty(1 << 20, device="cuda")

    timing = CudaClock().measure({"ours": call}, copies=4, calls=20)["ours"]
    assert isinstance(timing, Timing) and timing.time_us > 0
    replayed = (WARM_ROUNDS + ROUNDS) * 5
    assert counts.tolist() == [replayed + 1] * 4  # once before the capture


def test_outputs_of_a_rotation_are_different_memory():
    pointers = []

    def call(i: int):
        out = torch.empty(1 << 20, device="cuda")
        pointers.append(out.data_ptr())
        return out

    CudaClock().measure({"ours": call}, copies=4, calls=20)
    captured = pointers[1:]
    assert len(captured) == 20
    assert all(len(set(captured[i : i + 4])) == 4 for i in range(17))
    assert len(set(captured)) <= 5  # and no more memory than that


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="the sm_90 products have tables",
)
def test_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "table.json"
    assert main(["tune", "--shape", "512,1024", "--rounds", "3", "--out", str(path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{path}: 1 shapes\n") and "compiling " in captured.err
    entry = json.loads(path.read_text())["shapes"]["512,1024"]
    assert {op: tuple(map(int, entry["decode"][op])) for op in ("gemm", "linear")} == {
        op: TUNED[op] for op in ("gemm", "linear")
    }
    assert tuple(map(int, entry["prefill"])) == TUNED["prefill"]
