"""Which products of MLA go to this project's kernel, and what vLLM finds of their weights."""

from types import SimpleNamespace

import pytest
import torch
from checks import same_bits

pytest.importorskip("vllm")
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.utils import replace_parameter

from vllm_ue8m0 import warmup
from vllm_ue8m0.plugin import absorbed, foreign

H, P, R, L, V = 4, 128, 64, 512, 128
PREFIX = "model.layers.2.self_attn"


class Attention(torch.nn.Module):
    """vLLM's, of which there is what makes the weights."""

    num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim = H, L, P, R, V

    def process_weights_after_loading(self, dtype):
        whole = torch.randn(L, H, P + V).to(dtype)
        self.made = whole[..., :P].permute(1, 2, 0), whole[..., P:].transpose(0, 1)
        for name, made in zip(absorbed.NAMES, self.made, strict=True):
            replace_parameter(self, name, made)


@pytest.fixture
def layer(monkeypatch):
    """An MLA layer of a model that is being built, and what the kernel is given."""
    attention, given = Attention(), []

    def bmm(x, w, out):
        assert type(w) is torch.Tensor
        given.append(x.shape[1])
        torch.bmm(x, w, out=out)

    backend = SimpleNamespace(bmm=bmm, bmm_plan=int, bmm_shape_fits=lambda N, K: K % 128 == 0)
    monkeypatch.setattr(foreign, "backend", lambda: backend)
    monkeypatch.setattr(warmup, "_compiling", lambda *arguments: backend)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(foreign, "on_gpu", lambda tensor: True)
    config = VllmConfig()
    config.compilation_config.static_forward_context[f"{PREFIX}.attn"] = attention
    with set_current_vllm_config(config):
        yield SimpleNamespace(attention=attention, given=given)


def load(layer):
    layer.attention.process_weights_after_loading(torch.bfloat16)
    return [getattr(layer.attention, name) for name in absorbed.NAMES]


def test_products_go_to_the_kernel(layer):
    operator = absorbed.take(f"{PREFIX}.kv_b_proj", torch.bfloat16)
    assert operator.most == 64
    for w, made in zip(load(layer), layer.attention.made, strict=True):
        assert isinstance(w, torch.nn.Parameter) and same_bits(w.data, made)
        assert w.transpose(1, 2).is_contiguous()
        x = torch.randn(3, H, w.shape[1]).bfloat16().transpose(0, 1)
        out = torch.empty(H, 3, w.shape[2], dtype=x.dtype)
        assert torch.bmm(x, w, out=out) is out
        assert same_bits(out, torch.bmm(x, made))
        torch.bmm(x, w)  # not as vLLM calls it: torch's
    assert layer.given == [3, 3]


def test_memory_stays_over_reloads(layer):
    absorbed.take(f"{PREFIX}.kv_b_proj", torch.bfloat16)
    before = [w.data_ptr() for w in load(layer)]
    hook = layer.attention.process_weights_after_loading
    for _ in range(2):
        assert absorbed.take(f"{PREFIX}.kv_b_proj", torch.bfloat16) is None
        assert layer.attention.process_weights_after_loading is hook
        after = load(layer)
        assert [w.data_ptr() for w in after] == before
        for w, made in zip(after, layer.attention.made, strict=True):
            assert type(w) is absorbed.AbsorbedWeight and same_bits(w.data, made)
    # As vLLM's reload, which may leave a plain parameter of other memory.
    layer.attention.W_UV = torch.nn.Parameter(torch.randn(H, L, V).bfloat16(), requires_grad=False)
    assert [w.data_ptr() for w in load(layer)] == before
    assert same_bits(layer.attention.W_UV.data, layer.attention.made[1])


def test_parameters_are_vllms_to_handle(layer):
    """Named, copied, moved and sliced as others."""
    absorbed.take(f"{PREFIX}.kv_b_proj", torch.bfloat16)
    w, _ = load(layer)
    assert dict(layer.attention.named_parameters())["W_UK_T"] is w
    assert w.contiguous().stride() == (P * L, L, 1) and w[:2].shape == (2, P, L)
    w.data.zero_()
    assert not w.any()
    w.copy_(torch.ones(H, P, L))
    assert w.float().sum() == H * P * L


REASONS = ["batch-invariant", "another layer", "no kernel", "shape", "no MLA"]


@pytest.mark.parametrize("reason", REASONS)
def test_left_to_vllm(layer, reason, monkeypatch):
    prefix = PREFIX
    if reason == "batch-invariant":
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    if reason == "another layer":
        prefix = "model.layers.3.self_attn"
    if reason == "no kernel":
        monkeypatch.setattr(foreign, "backend", SimpleNamespace)
    if reason == "no MLA":
        monkeypatch.delattr(Attention, "kv_lora_rank")
    if reason == "shape":
        layer.attention.qk_nope_head_dim = 96
    assert absorbed.take(f"{prefix}.kv_b_proj", torch.bfloat16) is None
    assert "process_weights_after_loading" not in vars(layer.attention)


def test_outside_vllm():
    assert absorbed.take(f"{PREFIX}.kv_b_proj", torch.bfloat16) is None
