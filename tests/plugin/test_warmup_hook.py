"""What the plugin hands to the warm-up: every layer's operator, once, for a step's most rows."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from moe_layers import TOPK, checkpoint, create, load, moe_config

from vllm_ue8m0 import portable, warmup
from vllm_ue8m0.plugin import compat
from vllm_ue8m0.plugin.config import Ue8m0Config
from vllm_ue8m0.plugin.linear import Ue8m0LinearMethod

TOKENS = 2048


@pytest.fixture
def handed(monkeypatch):
    """The operators of each warm-up, on a server whose backend compiles."""
    handed = []
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=TOKENS),
        load_config=SimpleNamespace(load_format="auto"),
    )
    for name, value in (("rank", 0), ("world_size", 1)):
        target = f"vllm.model_executor.parameter.get_tensor_model_parallel_{name}"
        monkeypatch.setattr(target, lambda value=value: value)
    monkeypatch.setattr(compat, "current_config", lambda: config)
    monkeypatch.setattr(warmup, "_compiling", lambda op, device: portable)
    monkeypatch.setattr(warmup, "run", lambda operators, say: handed.append(list(operators)))
    return handed


def linear_layer(config, prefix):
    method, layer = Ue8m0LinearMethod(config, prefix), torch.nn.Module()
    method.create_weights(
        layer, 256, [128], 256, 128, torch.bfloat16, weight_loader=lambda *a: None
    )
    layer.weight.data.fill_(1.0)
    layer.weight_scale_inv.data.fill_(0.5)
    config.report.created += 1
    return method, layer


def test_linear_layers_are_handed_over_after_the_last(handed):
    config = Ue8m0Config.from_config({"quant_method": "fp8", "weight_block_size": [128, 128]})
    names = "o_proj", "kv_b_proj", "down_proj"
    layers = [linear_layer(config, f"model.layers.0.{name}") for name in names]
    for method, layer in layers:
        assert not handed
        method.process_weights_after_loading(layer)
    assert [operator.most for operator in handed[0]] == [TOKENS, compat.MLA_CONTEXT_ROWS, TOKENS]
    same, other, activated = (operator.key for operator in handed[0])
    assert same == other != activated  # the same kernels, and an activation's
    # A reload has nothing to compile, and nothing here keeps the old weights.
    assert config._operators is None


@pytest.mark.parametrize("simulated", ["", "uniform_random"])
def test_experts(handed, monkeypatch, simulated):
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", simulated)
    method, layer = create(moe_config())
    method.config.report.created += 1
    load(method, layer, checkpoint())
    ((operator,),) = handed
    assert operator.key[-2:] == (TOPK, torch.int64 if simulated else torch.int32)
    assert operator.most == TOKENS
    assert len(operator.representatives()) > 2
    assert method.config._operators is None
