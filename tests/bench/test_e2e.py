"""`bench e2e` around its processes, which are made up: what they are asked, and what is kept."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from vllm_ue8m0.bench import BenchError, e2e, e2e_report, e2e_serve, machine, records
from vllm_ue8m0.cli import main

GPU = "Test GPU"
FIXTURE = Path(__file__).parents[1] / "fixtures"
TIMES = {"ours": 100.0, "vllm_fp8": 150.0}
served = []  # what every server was started with


@pytest.fixture
def started(monkeypatch):
    """(job, environment) of every process; each measures what it is asked."""
    started = []

    def relay(command, env, phases):
        job = json.loads(Path(command[-1]).read_text())
        started.append((job, env))
        side = "ours" if job["engine"]["quantization"] == "ue8m0" else "vllm_fp8"
        time_us = TIMES[side]
        decode = {
            "gpu_us": time_us, "wall_us": None, "parts": {"rest": time_us / 2, "sampling": 0.0},
            "kernels": [["a_kernel", "rest", time_us / 2, 3.0]],
        }  # fmt: skip
        result = {"start_s": time_us, "gpu": GPU, "memory": 2**31}
        if job["decode"]:
            result["decode"] = {str(batch): decode for batch in job["decode"]}
        if job["prefill"]:
            result["prefill"] = {"wall_us": 10 * time_us, "gpu_us": 9 * time_us}
        Path(job["out"]).write_text(json.dumps(result))
        for cache in filter(None, [env.get("TRITON_CACHE_DIR")]):
            Path(cache, "kernel").touch()
        phases["graph capture"] = 3.0
        return 0

    def serve(engine, vocabulary, env, tokens, loads):
        served.append((engine, vocabulary, env, tokens, loads))
        assert Path(engine["model"], "config.json").exists()
        time_us = TIMES["ours" if engine["quantization"] == "ue8m0" else "vllm_fp8"]
        for rate, _ in loads:
            if rate == 7:
                raise BenchError("the server ended with status 1; see above")
            yield {
                "gpu": GPU, "ttft_us": 20 * time_us, "tpot_us": time_us, "ttft_p99_us": 1e4,
                "tpot_p99_us": 2e4, "first_ttft_us": 30 * time_us, "first_tpot_us": 2 * time_us,
                "requests_per_s": rate / 2,
            }  # fmt: skip

    served.clear()
    monkeypatch.setattr(e2e_serve, "measure", serve)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(e2e, "_relay", relay)
    monkeypatch.setattr(machine, "require_gpu", lambda: None)
    return started


def test_everything(started, tmp_path, capsys):
    out = tmp_path / "e2e.jsonl"
    assert main(["bench", "e2e", "--out", str(out), "--batch", "1", "16"]) == 0
    assert len(started) == 4  # cold and warm of each side
    (cold, first), (warm, second) = started[:2]
    assert cold["decode"] == [] and cold["prefill"] is None
    assert warm["decode"] == [1, 16] and warm["prefill"] == [8, 2048]
    assert first["TRITON_CACHE_DIR"] == second["TRITON_CACHE_DIR"]
    assert first["TRITON_CACHE_DIR"] != started[2][1]["TRITON_CACHE_DIR"]
    assert first["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] == "uniform_random"
    assert [job["engine"]["quantization"] for job, _ in started] == ["ue8m0"] * 2 + ["fp8"] * 2
    engine = {**cold["engine"], "quantization": "fp8"}
    assert {**started[2][0]["engine"], "model": engine["model"]} == engine

    measured = records.read(out)
    assert [(r.bench, r.M, r.variant.get("part")) for r in measured] == [
        ("start_cold", None, None), ("start_warm", None, None), ("prefill", 16384, None),
        ("decode_step", 1, None), ("decode_part", 1, "rest"),
        ("decode_step", 16, None), ("decode_part", 16, "rest"),
        ("serve_ttft", None, None), ("serve_tpot", None, None),
        ("serve_ttft", None, None), ("serve_tpot", None, None),
    ]  # fmt: skip
    assert all(r.gpu == GPU and set(r.peers_us) == {"vllm_fp8"} for r in measured)
    assert all(r.peers_us["vllm_fp8"] == 1.5 * r.ours_us for r in measured)
    cold_record, prefill, step = measured[0], measured[2], measured[3]
    assert cold_record.ours_us == 100e6 and cold_record.variant["ours_mib"] == 2048
    assert prefill.ours_us == 1000 and prefill.context_us["vllm_fp8 on the GPU"] == 1350
    expected = {"batch": 1, "layers": 5, "tp": 1, "routing": "uniform_random"}
    assert step.variant == expected and step.context_us == {}
    (ours, vocabulary, env, tokens, loads), stock = served
    assert ours == {**warm["engine"], "model": ours["model"]} and vocabulary == 129280
    assert stock[0]["quantization"] == "fp8" and stock[1] == vocabulary and stock[3:] == (
        tokens, loads
    )  # fmt: skip
    assert env["TRITON_CACHE_DIR"] == first["TRITON_CACHE_DIR"]
    assert tokens == (1024, 128) and loads == [(2.0, 20.0), (32.0, 20.0)]
    assert ours["max_model_len"] >= sum(tokens)
    ttft, tpot = measured[-2:]
    assert ttft.ours_us == 2000 and tpot.ours_us == 100
    assert tpot.context_us == {
        "ours, 99 %": 2e4, "vllm_fp8, 99 %": 2e4, "ours, at first": 200, "vllm_fp8, at first": 300
    }  # fmt: skip
    assert {**step.variant, "rate": "32/s", "input": 1024, "output": 128} == {
        **tpot.variant, "batch": 1
    }  # fmt: skip
    text = capsys.readouterr().out
    assert "vllm_fp8 serve 32: 16.00 requests/s answered" in text
    assert "ours start_cold: 100.0 s, 2.00 GiB beside the KV cache" in text
    assert "3.0 s  graph capture" in text and "a_kernel" in text
    assert "lm_head, attention and sampling: ours 50 us, vllm_fp8 75, ratio 1.50" in text
    assert "decode_step: vllm_fp8 1.50 over 2" in text
    assert main(["bench", "show", str(out)]) == 0


def test_calls_may_each_do_a_part(started, tmp_path):
    out = str(tmp_path / "e2e.jsonl")
    call = ["bench", "e2e", "--out", out, "--only"]
    assert main([*call, "decode_step", "--side", "vllm_fp8", "--batch", "16"]) == 0
    assert not Path(out).exists()  # there is nothing of ours to record
    assert main([*call, "decode_step", "--side", "ours", "--batch", "1"]) == 0
    assert main([*call, "prefill", "--side", "ours"]) == 0
    assert main([*call, "decode_step", "--side", "ours", "--batch", "16"]) == 0
    assert [job["decode"] for job, _ in started] == [[16], [1], [], [16]]
    assert all("TRITON_CACHE_DIR" not in env for _, env in started)  # the user's own
    found = {(r.bench, r.M): list(r.peers_us) for r in records.read(out)}
    assert found["decode_step", 1] == [] and found["decode_step", 16] == ["vllm_fp8"]
    assert found["prefill", 16384] == []


def test_sides_may_be_measured_at_the_same_time(started, monkeypatch, tmp_path):
    """What the other call keeps meanwhile is recorded too."""
    out, relay = str(tmp_path / "e2e.jsonl"), e2e._relay
    call = ["bench", "e2e", "--out", out, "--only", "prefill", "--side"]

    def meanwhile(*arguments):
        monkeypatch.setattr(e2e, "_relay", relay)
        assert main([*call, "ours"]) == 0
        return relay(*arguments)

    monkeypatch.setattr(e2e, "_relay", meanwhile)
    assert main([*call, "vllm_fp8"]) == 0
    (record,) = records.read(out)
    assert list(record.peers_us) == ["vllm_fp8"]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, SystemExit])
def test_what_a_stopped_call_has_measured_is_kept(started, monkeypatch, tmp_path, stopped):
    out, relay = tmp_path / "e2e.jsonl", e2e._relay
    call = ["bench", "e2e", "--out", str(out), "--side", "ours", "--batch", "1", "16", "--only"]

    def leave(*arguments):
        relay(*arguments)
        job, _ = started[-1]
        result = json.loads(Path(job["out"]).read_text())
        del result["decode"]["16"]
        Path(job["out"]).write_text(json.dumps(result))
        raise stopped

    monkeypatch.setattr(e2e, "_relay", leave)
    with suppress(SystemExit):
        assert main([*call, "start_cold", "decode_step"]) == 130
    monkeypatch.setattr(e2e, "_relay", relay)
    assert main([*call, "prefill"]) == 0
    found = {(r.bench, r.M) for r in records.read(out)}
    assert found == {
        ("start_cold", None), ("prefill", 16384), ("decode_step", 1), ("decode_part", 1)
    }  # fmt: skip
    (cold,) = (r for r in records.read(out) if r.bench == "start_cold")
    assert cold.ours_us == 100e6


def test_serve_alone(started, tmp_path, capsys):
    """It starts a server and nothing else; rates may be divided over calls."""
    out = tmp_path / "e2e.jsonl"
    call = ["bench", "e2e", "--out", str(out), "--only", "serve", "--side"]
    assert main([*call, "ours", "--rate", "0.5"]) == 0
    assert main([*call, "vllm_fp8", "--rate", "0.5", "7"]) == 1
    assert "vllm_fp8: the server ended with status 1" in capsys.readouterr().err
    assert main([*call, "ours", "--rate", "4"]) == 0
    assert started == [] and [loads[0][0] for *_, loads in served] == [0.5, 0.5, 4.0]
    assert "TRITON_CACHE_DIR" not in served[0][2]
    found = {(r.bench, r.variant["rate"]): len(r.peers_us) for r in records.read(out)}
    assert found == {
        ("serve_ttft", "0.5/s"): 1, ("serve_tpot", "0.5/s"): 1,
        ("serve_ttft", "4/s"): 0, ("serve_tpot", "4/s"): 0,
    }  # fmt: skip
    assert main(["bench", "show", str(out)]) == 0
    with pytest.raises(SystemExit):
        main([*call, "ours", "--rate", "inf"])


def test_another_setup_is_not_mixed_in(started, tmp_path, capsys):
    out = ["--out", str(tmp_path / "e2e.jsonl")]
    assert main(["bench", "e2e", *out, "--only", "prefill"]) == 0
    assert main(["bench", "e2e", *out, "--only", "prefill", "--layers", "4"]) == 1
    assert "results of another setup" in capsys.readouterr().err


def test_caches(started, tmp_path, capsys):
    caches = ["--side", "ours", "--caches", str(tmp_path), "--only"]
    assert main(["bench", "e2e", *caches, "start_warm"]) == 1
    assert "start_warm needs caches" in capsys.readouterr().err
    assert main(["bench", "e2e", *caches, "start_cold"]) == 0
    assert main(["bench", "e2e", *caches, "start_cold"]) == 1
    assert "no start is cold" in capsys.readouterr().err
    assert main(["bench", "e2e", *caches, "start_warm", "decode_step"]) == 0
    assert started[-1][1]["TRITON_CACHE_DIR"].startswith(str(tmp_path / "ours"))


def test_router_and_arguments(started):
    options = ["--routing", "router", "--engine", '{"kv_cache_dtype": "fp8"}', "--only", "prefill"]
    assert main(["bench", "e2e", *options, "--tensor-parallel-size", "2", "--side", "ours"]) == 0
    ((job, env),) = started
    assert "VLLM_MOE_ROUTING_SIMULATION_STRATEGY" not in env
    assert job["engine"]["kv_cache_dtype"] == "fp8" and job["engine"]["tensor_parallel_size"] == 2
    with pytest.raises(SystemExit):
        main(["bench", "e2e", "--engine", "[1]"])


@pytest.mark.parametrize(("value", "said"), [("skip", 1), ("relax", 0), (None, 0)])
def test_a_peer_that_compiles_while_it_serves(started, monkeypatch, capsys, value, said):
    monkeypatch.delenv(e2e.DEEP_GEMM_WARMUP, raising=False)
    if value is not None:
        monkeypatch.setenv(e2e.DEEP_GEMM_WARMUP, value)
    assert main(["bench", "e2e", "--only", "prefill"]) == 0
    found = capsys.readouterr()
    assert (found.out + found.err).count(f"vllm_fp8: {e2e.DEEP_GEMM_WARMUP}=skip") == said


def test_a_start_that_fails(started, monkeypatch, capsys):
    def relay(command, env, phases):
        job = json.loads(Path(command[-1]).read_text())
        Path(job["error"]).write_text("ValueError: too many layers")
        return 1

    monkeypatch.setattr(e2e, "_relay", relay)
    assert main(["bench", "e2e"]) == 1
    error = capsys.readouterr().err
    assert "ours: vLLM did not start: ValueError: too many layers; see above" in error
    assert main(["bench", "e2e", "--model", "nowhere"]) == 1
    assert "nowhere/config.json cannot be read" in capsys.readouterr().err


def test_model():
    """The published configuration, but for its layers."""
    assert json.loads(e2e.CONFIG.read_text()) == json.loads(
        (FIXTURE / "configs/deepseek-v3.1.json").read_text()
    )
    config = e2e.Setup(layers=5).config()
    assert (config["num_hidden_layers"], config["first_k_dense_replace"]) == (5, 1)
    assert config["hidden_size"] == 7168 and config["n_routed_experts"] == 256


def test_phases_are_read_from_logs(capfd):
    lines = [
        "INFO [gpu_model_runner.py:1] Model loading took 12.5 GiB memory and 33.125 seconds",
        "INFO ue8m0: warm-up: every kernel is ready, 21.5 s",
        "INFO torch.compile took 27.25 s in total",
        "INFO Graph capturing finished in 12 secs, took 1.50 GiB",
        "INFO init engine (profile, create kv cache, warmup model) took 60.00 s",
    ]
    import os
    import sys

    command = [sys.executable, "-c", f"print({chr(10).join(lines)!r})"]
    phases = {}
    assert e2e._relay(command, dict(os.environ), phases) == 0
    assert list(phases.values()) == [33.125, 21.5, 27.25, 12.0, 60.0]
    assert capfd.readouterr().err.splitlines() == lines


def test_a_record_of_the_other_side_alone_is_none():
    assert list(e2e_report.records(e2e.Setup(), {"vllm_fp8": {"prefill": {}}})) == []
    with pytest.raises(BenchError):
        e2e.Setup(model="nowhere").config()
