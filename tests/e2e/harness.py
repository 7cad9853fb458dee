"""Run vLLM in child processes, and compare next-token distributions."""

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures"
EXIT_ABORT = "terminate called without an active exception"
GPU = torch.cuda.is_available()
GRAPH = {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "NONE"}}
# On a GPU they are, unless the user orders otherwise.
OUR_NORMS = {
    "ir_op_priority": {op: ["ue8m0", "native"] for op in ("rms_norm", "fused_add_rms_norm")}
}
# On CPUs with AMX vLLM has another attention for MLA, which rounds more; here all have the same.
ATTENTION = {} if GPU else {"attention_backend": "CPU_MLA"}
# Of vLLM, for tiny models: engines that leave room for others on a GPU, and so for other tests.
SMALL = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 2**29} if GPU else ATTENTION
SMALL_OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def run_vllm(*command, stdout_only=False, **kwargs):
    """A child Python that may use vLLM, returns what it printed; asserts that it succeeded."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=env, capture_output=True, text=True, **kwargs
    )
    # vLLM's CPU build sometimes aborts at interpreter exit, after all work is done.
    aborted = done.returncode == -6 and done.stderr.rstrip().endswith(EXIT_ABORT)
    assert done.returncode == 0 or aborted, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + ("" if stdout_only else done.stderr)


def check_alone_and_together(steps):
    """`scores` of prompts asked one by one and all at once: the same, bit for bit."""
    for one, many in zip(*steps, strict=True):
        assert all(map(torch.equal, one, many))


def kl(reference, other):
    """Mean KL(reference || other) in nats per token; lists of [T, V] logits."""
    total = tokens = 0
    for p, q in zip(reference, other, strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum().item()
        tokens += len(p)
    return total / tokens
