"""The same model in every parallel layout that the machine has ranks for."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import FIXTURES, GPU, HERE, check_alone_and_together, kl, run_vllm
from tiny_deepseek.checkpoint import encode

MODEL = FIXTURES / "tiny_deepseek"
pytestmark = pytest.mark.vllm
# Without rounded activations; in float32, which vLLM's MLA backends on GPUs do not take, only the
# order of sums differs. In bfloat16 a unit flips a route now and then.
PLAIN = {"additional_config": {"ue8m0": {"activation_scale": "none"}}}
PLAIN |= {} if GPU else {"dtype": "float32"}
SAME = 1e-3 if GPU else 1e-6  # nats a token; 1.2e-4 with two ranks (H200, 2026-11-29)
RANKS = torch.cuda.device_count() if GPU else 2
EP = {"enable_expert_parallel": True}


def ids():
    return encode((FIXTURES / "heldout.txt").read_bytes()).tolist()


PROMPTS = [ids()[:256], ids()[256:400]]


def ranks(count):
    return pytest.mark.skipif(count > RANKS, reason=f"needs {count} GPUs")


@pytest.fixture
def single(served):
    return served(MODEL, PROMPTS, generate=16, **PLAIN)


@ranks(2)
def test_pipeline_parallel(single, served):
    """One layer on each rank: the same logits, bit for bit, and the same text."""
    # vLLM's CPU worker makes the buffers between ranks only where it warms up a compiled model.
    compiled = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    options = PLAIN if GPU else PLAIN | compiled
    run = served(MODEL, PROMPTS, generate=16, pipeline_parallel_size=2, **options)
    assert all(map(torch.equal, single["logits"], run["logits"]))
    assert single["greedy"] == run["greedy"]


@pytest.mark.skipif(not GPU, reason="two ranks: test_deepseek.py, which has the CPU's bound")
@pytest.mark.parametrize("layout", [
    pytest.param({"tensor_parallel_size": 2}, id="tp2", marks=ranks(2)),
    pytest.param({"tensor_parallel_size": 2, **EP}, id="ep2", marks=ranks(2)),
    pytest.param({"tensor_parallel_size": 4}, id="tp4", marks=ranks(4)),
    pytest.param({"tensor_parallel_size": 4, **EP}, id="ep4", marks=ranks(4)),
    pytest.param({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, id="tp2-pp2",
                 marks=ranks(4)),
])  # fmt: skip
def test_ranks_agree(single, served, layout):
    found = kl(single["logits"], served(MODEL, PROMPTS, **layout, **PLAIN)["logits"])
    print(layout, found)
    assert found < SAME


def data_parallel(folder, prompts, **options):
    """What `served` returns, of ranks that have a list of prompts each and step together."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if not GPU:
        options["worker_extension_cls"] = "cpu_collectives.Installed"

    common = options.pop("env", {})

    def rank(i):
        env = {"VLLM_DP_RANK": i, "VLLM_DP_RANK_LOCAL": i, "VLLM_DP_SIZE": len(prompts),
               "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": port}  # fmt: skip
        env = common | {name: str(value) for name, value in env.items()}
        tokens, out = folder / f"tokens{i}.pt", folder / f"out{i}.pt"
        torch.save(prompts[i], tokens)
        log = run_vllm(HERE / "served.py", MODEL, tokens, out, json.dumps({**options, "env": env}))
        return {**torch.load(out), "log": log}

    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(rank, range(len(prompts))))


@ranks(2)
def test_data_parallel_with_expert_parallel(single, tmp_path):
    """Two ranks with different prompts at the same time, and half of the experts each."""
    both = data_parallel(tmp_path, [PROMPTS, PROMPTS[::-1]], generate=16, **EP, **PLAIN)
    for run, order in zip(both, (1, -1), strict=True):
        found = kl(single["logits"][::order], run["logits"])
        print(found)
        assert found < SAME
        if not GPU:
            assert single["greedy"][::order] == run["greedy"]
    assert "all2all manager" in both[0]["log"]  # tokens travel between the ranks


INVARIANT = {"steps": [("scores", False), ("scores", True)], "env": {"VLLM_BATCH_INVARIANT": "1"}}
needs_invariance = pytest.mark.skipif(not GPU, reason="VLLM_BATCH_INVARIANT=1 is Triton's kernels")


@needs_invariance
@pytest.mark.parametrize("layout", [
    pytest.param({"tensor_parallel_size": 2}, id="tp2", marks=ranks(2)),
    pytest.param({"tensor_parallel_size": 2, **EP}, id="ep2", marks=ranks(2)),
    pytest.param({"tensor_parallel_size": 4}, id="tp4", marks=ranks(4)),
    pytest.param({"tensor_parallel_size": 4, **EP}, id="ep4", marks=ranks(4)),
])  # fmt: skip
def test_batch_invariant(served, layout):
    """With rounded activations, alone and in a batch: bit for bit the same."""
    check_alone_and_together(served(MODEL, PROMPTS, **INVARIANT, **layout)["steps"])


@needs_invariance
@ranks(2)
def test_batch_invariant_data_parallel(tmp_path):
    """The experts of a step have the rows of both ranks, whose prompts differ."""
    lists = [PROMPTS, [PROMPTS[1][:60], PROMPTS[0][:100]]]
    for run in data_parallel(tmp_path, lists, **INVARIANT, **EP):
        check_alone_and_together(run["steps"])


@pytest.mark.skipif(not GPU, reason="vLLM: load balancing is only supported on GPUs")
@ranks(2)
@pytest.mark.parametrize("redundant", [0, 2])
def test_expert_load_balancing(served, redundant):
    """Experts move between ranks while serving: the text before and after is the same."""
    balance = {"window_size": 8, "step_interval": 16, "use_async": False,
               "num_redundant_experts": redundant}  # fmt: skip
    layout = {"tensor_parallel_size": 2, **EP}
    steps = [("experts", None), ("greedy", 48), ("experts", None), ("greedy", 16), ("logits", None)]
    fixed = served(MODEL, PROMPTS, generate=16, **layout, **PLAIN)
    run = served(MODEL, PROMPTS, generate=16, steps=steps, enable_eplb=True, eplb_config=balance,
                 **layout, **PLAIN)  # fmt: skip
    before, _, moved, text, logits = run["steps"]
    assert before != moved
    assert {sum_ for rank in before for sum_ in rank} == {sum_ for rank in moved for sum_ in rank}
    assert text == run["greedy"]
    assert kl(fixed["logits"], logits) < SAME
