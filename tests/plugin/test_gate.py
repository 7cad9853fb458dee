"""Which products by routed experts' gate go to this project's kernels."""

from types import SimpleNamespace

import pytest
import torch
from checks import same_bits

pytest.importorskip("vllm")
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_ue8m0 import warmup
from vllm_ue8m0.plugin import foreign, gate

E, K = 64, 256
PREFIX = "model.layers.3.mlp.experts"


class GateLinear(torch.nn.Module):
    """vLLM's, of which there is what multiplies."""

    def __init__(self, out_dtype):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(E, K).bfloat16(), requires_grad=False)
        self.out_dtype = out_dtype

    def forward(self, x):
        return "vLLM's"


@pytest.fixture(params=[None, torch.float32])
def layer(request, monkeypatch):
    """A layer of experts in a model that is being built, and what the kernel is given."""
    linear, given = GateLinear(request.param), []

    def product(x, w, dtype):
        given.append(len(x))
        return (x.float() @ w.float().T).to(dtype)

    def refusal(x, w):
        return None if 0 < len(x) <= 64 and w.dtype == torch.bfloat16 else "refused"

    backend = SimpleNamespace(gate=product, gate_refusal=refusal, bmm_plan=int)
    monkeypatch.setattr(foreign, "backend", lambda: backend)
    monkeypatch.setattr(foreign, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(warmup, "_compiling", lambda *arguments: backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = VllmConfig()
    runner = SimpleNamespace(gate=linear)
    config.compilation_config.static_forward_context[PREFIX] = runner
    with set_current_vllm_config(config):
        yield SimpleNamespace(gate=linear, given=given, runner=runner)


def test_few_tokens_go_to_the_kernel(layer):
    operator = gate.take(PREFIX)
    assert operator.most == 64
    rows = (1, 5, 64)
    for M in rows:
        x = torch.randn(M, K).bfloat16()
        logits, bias = layer.gate(x)
        wanted = (x.float() @ layer.gate.weight.float().T).to(layer.gate.out_dtype or x.dtype)
        assert bias is None and same_bits(logits, wanted)
    assert layer.given == list(rows)
    assert layer.gate(torch.zeros(65, K).bfloat16()) == "vLLM's"
    assert layer.given == list(rows)


KERNELS = [("allow_dsv3_router_gemm", 2, torch.float32), ("allow_ll_bf16_gemm", 17, torch.bfloat16)]


@pytest.mark.parametrize(("kernel", "least", "logits"), KERNELS)
def test_fewer_go_to_a_kernel_that_vllm_has(layer, kernel, least, logits):
    """Whose results are float32 where nobody asks for another dtype."""
    setattr(layer.gate, kernel, True)
    operator = gate.take(PREFIX)
    assert layer.gate(torch.zeros(least - 1, K).bfloat16()) == "vLLM's"
    for M, own in ((least, logits), (17, torch.bfloat16)):
        found, _ = layer.gate(torch.zeros(M, K).bfloat16())
        assert found.dtype == operator.plan(M)[1] == (layer.gate.out_dtype or own)
    assert layer.given == [least, 17]


def test_a_weight_that_is_loaded_anew_multiplies(layer):
    gate.take(PREFIX)
    forward = layer.gate.forward
    layer.gate.weight = torch.nn.Parameter(torch.ones(E, K).bfloat16(), requires_grad=False)
    assert gate.take(PREFIX) is None and layer.gate.forward is forward
    assert (layer.gate(torch.ones(4, K).bfloat16())[0] == K).all()


def test_vllms_own_class(layer, monkeypatch):
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.fused_moe.router import gate_linear

    for module in (linear, parameter):  # no process group
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    logits = layer.gate.out_dtype
    served = gate_linear.GateLinear(K, E, out_dtype=logits, params_dtype=torch.bfloat16)
    served.weight.data.normal_()
    layer.runner.gate = served
    assert gate.take(PREFIX) is not None
    x = torch.randn(20, K).bfloat16()
    found, bias = served(x)
    wanted = (x.float() @ served.weight.float().T).to(logits or x.dtype)
    assert layer.given == [20] and bias is None and same_bits(found, wanted)


def test_not_where_a_graph_is_traced(layer, monkeypatch):
    gate.take(PREFIX)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layer.gate(torch.zeros(4, K).bfloat16()) == "vLLM's"


REASONS = ["batch-invariant", "another layer", "no kernel", "dtype", "no gate", "another class"]
REASONS += ["not on a GPU", "without GPUs"]


@pytest.mark.parametrize("reason", REASONS)
def test_left_to_vllm(layer, reason, monkeypatch):
    prefix = PREFIX
    if reason == "batch-invariant":
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    if reason == "another layer":
        prefix = "model.layers.4.mlp.experts"
    if reason == "no kernel":
        monkeypatch.setattr(foreign, "backend", SimpleNamespace)
    if reason == "dtype":
        layer.gate.weight.data = layer.gate.weight.data.float()
    if reason == "not on a GPU":
        monkeypatch.setattr(foreign, "on_gpu", lambda tensor: False)
    if reason == "without GPUs":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if reason == "no gate":
        layer.runner.gate = None
    if reason == "another class":
        layer.runner.gate = torch.nn.Linear(K, E)
    assert gate.take(prefix) is None
    assert "forward" not in vars(layer.gate)


def test_outside_vllm():
    assert gate.take(PREFIX) is None
