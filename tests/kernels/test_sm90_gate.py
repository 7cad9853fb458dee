"""Routed experts' gate on sm_90: by parts of K, rounded once, served through vLLM's own layer."""

from types import SimpleNamespace

import pytest
import torch
from checks import same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs sm_90",
    ),
]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def operands(M, E, K, dtype=BF16):
    return (torch.randn(rows, K, device="cuda").to(dtype) for rows in (M, E))


@pytest.mark.parametrize(("dtype", "logits"), [(BF16, BF16), (BF16, F32), (F16, F16)])
@pytest.mark.parametrize(("E", "K"), [(256, 7168), (384, 7168), (64, 512), (128, 6144)])
@pytest.mark.parametrize("M", [1, 2, 7, 16, 17, 64])
def test_sums_are_rounded_once(M, E, K, dtype, logits):
    from vllm_ue8m0 import sm90

    x, w = operands(M, E, K, dtype)
    found = sm90.gate(x, w, logits)
    assert found.dtype == logits and found.shape == (M, E)
    exact = x.double() @ w.double().T
    bound = K * 2**-24 * (x.double().abs() @ w.double().abs().T)
    bound += exact.abs() * torch.finfo(logits).eps / 2 * 1.01 + 1e-7
    assert (found.double() - exact).abs().le(bound).all()


def test_rows_do_not_depend_on_others():
    from vllm_ue8m0 import sm90

    x, w = operands(64, 256, 7168)
    every = sm90.gate(x, w, F32)
    for M in (1, 8, 20):
        assert same_bits(sm90.gate(x[-M:], w, F32), every[-M:])


def test_refusals():
    from vllm_ue8m0 import sm90

    x, w = operands(4, 128, 1024)
    cases = {
        "dtypes": (x.half(), w),
        "65 rows": (x[:1].expand(65, 1024), w),
        "E a multiple": (x, w[:100]),
        "K of": (x[:, :768].contiguous(), w[:, :768].contiguous()),
        "not contiguous": (torch.cat((x, x), 1)[:, :1024], w),
    }
    for reason, (a, b) in cases.items():
        assert reason in sm90.gate_refusal(a, b)
        with pytest.raises(ValueError, match=reason):
            sm90.gate(a, b, F32)


@pytest.mark.parametrize("logits", [None, F32])
def test_of_vllms_layer(logits, monkeypatch):
    """Every number of rows gives what its own products give, but for the order of a sum."""
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

    from vllm_ue8m0 import sm90
    from vllm_ue8m0.plugin import gate

    product, given = sm90.gate, []
    monkeypatch.setattr(sm90, "gate", lambda x, *rest: given.append(len(x)) or product(x, *rest))
    for module in (linear, parameter):  # no process group
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
    config, prefix = VllmConfig(), "model.layers.3.mlp.experts"
    with set_current_vllm_config(config):
        layer = GateLinear(7168, 256, out_dtype=logits, params_dtype=BF16, prefix="gate").cuda()
        torch.nn.init.normal_(layer.weight, std=0.02)
        config.compilation_config.static_forward_context[prefix] = SimpleNamespace(gate=layer)
        own = layer.forward
        operator = gate.take(prefix)
    for M in (1, 2, 5, 16, 17, 64, 65, 300):
        operator.launch(min(M, 64))
        given.clear()
        x = torch.randn(M, 7168, device="cuda").to(BF16)
        (found, bias), (wanted, _) = layer(x), own(x)
        assert bias is None and found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-4)
        assert given == [M] * (gate._least_rows(layer) <= M <= 64)
