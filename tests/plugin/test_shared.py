"""Shared experts' activation, left to the linear layer behind it."""

from types import SimpleNamespace

import pytest
import torch
from checks import random_codes, random_scale, same_bits

pytest.importorskip("vllm")

from moe_layers import checkpoint, create, load, moe_config, tokens
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import LinearBase

from vllm_ue8m0 import reference
from vllm_ue8m0.plugin import compat
from vllm_ue8m0.plugin.config import Ue8m0Config
from vllm_ue8m0.plugin.linear import Ue8m0LinearMethod

GRAN, K, N = (128, 128), 256, 384


class DeepseekV2MLP(torch.nn.Module):
    """vLLM's, with a down_proj of this project that needs no process group."""

    def __init__(self, activation=SiluAndMul, method=None):
        super().__init__()
        self.act_fn, self.down_proj = activation(), Down(method)

    def forward(self, gate_up):
        return self.down_proj(self.act_fn(gate_up))


class Down(LinearBase):
    def __init__(self, method):
        torch.nn.Module.__init__(self)
        config = Ue8m0Config.from_config({"quant_method": "fp8", "weight_block_size": [128, 128]})
        self.quant_method = Ue8m0LinearMethod(config, "down_proj") if method is None else method
        self.quant_method.gran = GRAN
        self.input_size_per_partition, self.orig_dtype = K, torch.bfloat16
        self.weight = random_codes(N, K, device="cpu")
        self.weight_scale_inv = random_scale(3, 2, dtype=torch.uint8, device="cpu")
        self.weight_scale_c = None

    def forward(self, x):
        return self.quant_method.apply(self, x)


@pytest.fixture(autouse=True)
def config():
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def experts():
    method, layer = create(moe_config())
    load(method, layer, checkpoint())
    return lambda mlp: method.apply(layer, *tokens(5), SimpleNamespace(_layer=mlp), None)


def test_taken_by_the_first_call_of_the_experts(experts):
    mlp, gate_up = DeepseekV2MLP(), torch.randn(7, 2 * K).bfloat16()
    # vLLM compiles it where it is not in a graph, without the rounding between the two steps.
    before = mlp.down_proj(SiluAndMul.forward_native(gate_up))
    for _ in range(2):
        experts(mlp)
        assert not isinstance(mlp.act_fn, SiluAndMul)
        down = mlp.down_proj
        layer = down.weight, down.weight_scale_inv, None, None, GRAN, "fp32"
        assert same_bits(mlp(gate_up), reference.silu_mul_linear(gate_up, *layer))
        assert same_bits(mlp(gate_up), before)
        # A graph that was compiled before.
        assert same_bits(mlp.down_proj(SiluAndMul.forward_native(gate_up)), before)


def test_a_graph_that_is_traced_keeps_its_modules(experts, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    mlp = DeepseekV2MLP()
    experts(mlp)
    assert isinstance(mlp.act_fn, SiluAndMul)


def test_no_other_layer_activates():
    """A wrong width is an error."""
    with pytest.raises((RuntimeError, ValueError)):
        Down(None)(torch.randn(7, 2 * K).bfloat16())


class Other(SiluAndMul):
    pass


class Foreign:
    pass


@pytest.mark.parametrize("kind", ["another activation", "another method", "another module", "none"])
def test_others_are_left(experts, kind):
    if kind == "none":
        experts(None)
        return
    mlp = DeepseekV2MLP(
        Other if kind == "another activation" else SiluAndMul,
        Foreign() if kind == "another method" else None,
    )
    if kind == "another module":
        mlp.__class__ = type("Mlp", (DeepseekV2MLP,), {})
    experts(mlp)
    assert isinstance(mlp.act_fn, SiluAndMul)


def test_a_wrapped_layer_is_left(experts):
    """As LoRA wraps it: it adds to the product of what it is given."""
    mlp = DeepseekV2MLP()
    inner = mlp.down_proj
    mlp.down_proj = torch.nn.Module()
    mlp.down_proj.base_layer, mlp.down_proj.quant_method = inner, inner.quant_method
    experts(mlp)
    assert isinstance(mlp.act_fn, SiluAndMul)


def test_what_vllm_calls_it():
    from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts
    from vllm.model_executor.models.deepseek_v2 import DeepseekV2MLP as Real

    shared = SharedExperts.__new__(SharedExperts)
    torch.nn.Module.__init__(shared)
    shared._layer = Real.__new__(Real)
    assert type(compat.shared_mlp(shared)).__name__ == DeepseekV2MLP.__name__
