"""Experts whose tokens stay where they are: as in vLLM's kernel, without its copy of the result."""

import pytest
import torch
from checks import same_bits

pytest.importorskip("vllm")
from moe_layers import checkpoint, create, load, moe_config, run, tokens
from vllm.config import VllmConfig, set_current_vllm_config


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_same_bits_as_by_vllms_kernel(monkeypatch, on_input, mapped):
    with set_current_vllm_config(VllmConfig()):
        method, layer = create(moe_config(), scale_fmt="ue8m0")
        load(method, layer, checkpoint())
        x, weights, ids = tokens(6)
        if on_input:  # vLLM: of one expert a token
            weights, ids = weights[:, :1].contiguous(), ids[:, :1].contiguous()
        layer.apply_router_weight_on_input = on_input
        if mapped:
            layer.expert_map = torch.tensor([2, -1, 0, 3], dtype=torch.int32)
        wanted = method.moe_kernel.apply(
            hidden_states=x, w1=layer.w13_weight, w2=layer.w2_weight, topk_weights=weights,
            topk_ids=ids, activation=layer.activation, global_num_experts=4,
            expert_map=layer.expert_map, apply_router_weight_on_input=on_input,
        )  # fmt: skip
        assert wanted.isfinite().all() and wanted.any()

        monkeypatch.setattr(type(method.moe_kernel), "apply", None)
        assert same_bits(run(method, layer, x, weights, ids), wanted)
        assert run(method, layer, x[:0], weights[:0], ids[:0]).shape == (0, x.shape[1])
