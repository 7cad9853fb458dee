"""`bench e2e` with vLLM and the fixture: both sides ours, since stock fp8 asks more of a CPU."""

from dataclasses import replace

import pytest
import torch
from harness import FIXTURES, GPU

from vllm_ue8m0.bench import e2e, e2e_report, e2e_worker

pytestmark = pytest.mark.vllm
SETUP = e2e.Setup(
    model=str(FIXTURES / "tiny_deepseek"), layers=2, batches=(1, 3), context=16, steps=6,
    prefill=(2, 40), serve=(20, 5),
    engine=(("enforce_eager", True), ("max_num_batched_tokens", 64), ("max_num_seqs", 8)),
)  # fmt: skip


@pytest.mark.parametrize("multiprocessing", ["0", "1"])
def test_measuring(monkeypatch, tmp_path, multiprocessing):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(e2e, "_PHASES", {"engine": e2e._PHASES["engine, with the last two"]})
    out, only = str(tmp_path / "e2e.jsonl"), ("start_cold", "prefill", "decode_step")
    said = []
    results = e2e.measure(SETUP, only, ["ours"], out, None, said.append)
    assert said == ["ours: start_cold and prefill and decode_step"]
    found = results["ours"]
    assert set(found) == {"start_cold", "prefill", "decode_step 1", "decode_step 3"}
    assert found["start_cold"]["start_s"] > found["start_cold"]["phases"]["engine"] > 0
    assert found["prefill"]["wall_us"] > 0 and found["prefill"]["gpu_us"] > 0
    benches = [r.bench for r in e2e_report.records(SETUP, results) if r.bench != "decode_part"]
    assert benches == ["start_cold", "prefill", "decode_step", "decode_step"]
    if GPU:
        assert found["decode_step 3"]["parts"]["routed experts"] > 0
        assert found["start_cold"]["memory"] > 0
    # A later call adds to it.
    assert e2e.measure(SETUP, ["prefill"], [], out, None, said.append) == results


def test_serving_under_load(monkeypatch, tmp_path):
    """A server, the extension of its workers, and `vllm bench serve`, which reports every token."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    setup = replace(SETUP, rates=(4.0,), serve_seconds=2)
    results = e2e.measure(setup, ["serve"], ["ours"], str(tmp_path / "e2e.jsonl"), None, print)
    (found,) = results["ours"].values()
    assert found["ttft_us"] > 0 and found["tpot_us"] > 0 and found["requests_per_s"] > 0
    assert (found["memory"] or 0) > 0 if GPU else found["gpu"] == "CPU"
    assert [r.bench for r in e2e_report.records(setup, results)] == ["serve_ttft", "serve_tpot"]


class Model(torch.nn.Module):
    def __init__(self, scale_dtype):
        super().__init__()

        def parameter(*shape, dtype):
            return torch.nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)

        self.weight = parameter(300, 64, dtype=torch.float8_e4m3fn)
        self.weight_scale_inv = parameter(3, 1, dtype=scale_dtype)
        self.w13_weight = parameter(4, 128, 64, dtype=torch.float8_e4m3fn)
        self.input_layernorm = torch.nn.RMSNorm(64)
        self.gate = parameter(8, 64, dtype=torch.bfloat16)
        self.e_score_correction_bias = parameter(8, dtype=torch.float32)
        self.expert_ids = parameter(8, dtype=torch.int32)
        self.W_UV = torch.empty(4, 64, 16, dtype=torch.bfloat16)


class Worker:
    rank = 0

    def __init__(self, scale_dtype):
        self.model = Model(scale_dtype)

    def get_model(self):
        return self.model


def test_sides_get_the_same_weights():
    ours, theirs = Worker(torch.uint8), Worker(torch.float32)
    assert e2e_worker.fill(ours) == e2e_worker.fill(theirs) == 6
    for name, one in ours.model.named_parameters():
        other = theirs.model.get_parameter(name)
        if "scale" in name:
            assert (one == 113).all() and (other == 2.0**-14).all()
        elif name != "expert_ids":
            assert torch.equal(one.float(), other.float()), name
    codes = ours.model.weight.float()
    assert 80 < codes.std() < 120 and codes.abs().max() <= 448
    assert not torch.equal(ours.model.w13_weight[0].float(), ours.model.w13_weight[1].float())
    assert (ours.model.input_layernorm.weight == 1).all()
    assert (ours.model.e_score_correction_bias == 0).all()
    assert torch.equal(ours.model.W_UV, theirs.model.W_UV)
    assert 0.01 < ours.model.W_UV.float().std() < 0.03
    theirs.rank = 1
    e2e_worker.fill(theirs)
    assert not torch.equal(theirs.model.weight.float(), codes)  # another shard
