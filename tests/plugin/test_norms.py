"""vLLM's norms on this project's kernel: as vLLM calls and orders them."""

import pytest
import torch
from checks import same_bits

pytest.importorskip("vllm")
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_ue8m0 import reference
from vllm_ue8m0.plugin import compat, norms

OPS = ("rms_norm", "fused_add_rms_norm")
EPS = 1e-6


@pytest.fixture
def config():
    config = VllmConfig()
    before = {op: getattr(ir.ops, op).get_priority() for op in OPS}
    norms.register()
    with set_current_vllm_config(config):
        yield config
    for op in OPS:
        getattr(ir.ops, op).set_default(before[op] or ["native"])


def priority(config):
    return [getattr(config.kernel_config.ir_op_priority, op)[0] for op in OPS]


def test_first_of_all_where_they_take_the_arguments(config):
    norms.prefer()
    assert priority(config) == ["ue8m0"] * 2
    x, residual = torch.randn(2, 5, 300).bfloat16()
    weight = torch.rand(300).bfloat16()
    normed, total = ir.ops.fused_add_rms_norm(x, residual, weight, EPS)
    wanted = reference.add_rms_norm(x, weight, EPS, residual)
    assert same_bits(normed, wanted[0]) and same_bits(total, wanted[1])
    assert same_bits(ir.ops.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    op = ir.ops.rms_norm
    for arguments in ((x[None], weight, EPS), (x, None, EPS), (x, weight, EPS, 100)):
        assert op.dispatch(*arguments).provider == "native"
    assert op.dispatch(x, weight, EPS).provider == "ue8m0"


def test_as_vllm_calls_them_in_a_graph(config):
    from vllm.model_executor.layers.layernorm import RMSNorm

    norms.prefer()
    layer = RMSNorm(300, EPS).bfloat16()
    x, residual = torch.randn(2, 5, 300).bfloat16()
    wanted = reference.add_rms_norm(x, layer.weight, EPS, residual)
    got = layer(x.clone(), residual.clone())
    assert same_bits(got[0], wanted[0]) and same_bits(got[1], wanted[1])


def test_the_users_order_stays(config):
    config.kernel_config.ir_op_priority.rms_norm = ["vllm_c", "native"]
    norms.prefer()
    assert priority(config) == ["vllm_c", "ue8m0"]


@pytest.mark.parametrize("error", [ImportError, AttributeError, TypeError])
def test_a_vllm_that_takes_none_keeps_its_own(config, monkeypatch, error):
    """The plugin is loaded for every model: one release's change must not stop them all."""
    warned = []

    def refuse(*args):
        raise error("no such thing")

    monkeypatch.setattr(compat, "register_norm", refuse)
    for op in OPS:
        monkeypatch.delitem(getattr(ir.ops, op).impls, norms.NAME)
    monkeypatch.setattr(norms.logger, "warning", lambda *args: warned.append(args))
    norms.register()
    assert len(warned) == 1
    before = priority(config)
    norms.prefer()
    assert priority(config) == before


def test_nothing_changes_on_a_cpu(config):
    from vllm_ue8m0.formats import QuantSpec
    from vllm_ue8m0.plugin.config import Ue8m0Config

    Ue8m0Config(QuantSpec())._read_options()
    assert compat.platform() == "cpu"
    assert "ue8m0" not in priority(config)
