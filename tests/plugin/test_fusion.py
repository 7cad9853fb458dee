"""The pass that takes norms into linear layers, on graphs as vLLM gives them to a pass."""

from operator import getitem

import pytest
import torch
from checks import random_codes, random_scale, same_bits

pytest.importorskip("vllm")
from torch.fx.experimental.proxy_tensor import make_fx
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_ue8m0.library import OPS
from vllm_ue8m0.plugin import compat, fusion, norms

EPS, GRAN = 1e-6, (128, 128)
NORMS = ("rms_norm", "fused_add_rms_norm")
M, K, N = 5, 256, 384


@pytest.fixture
def config():
    """vLLM's norms are ours, and stay functions of vLLM in a graph."""
    config = VllmConfig()
    before = {op: getattr(ir.ops, op).get_priority() for op in NORMS}
    norms.register()
    with set_current_vllm_config(config):
        norms.prefer()
        yield config
    for op in NORMS:
        getattr(ir.ops, op).set_default(before[op] or ["native"])


def operands():
    """x, residual, the norm's weight, w, sf."""
    x, residual = torch.randn(2, M, K).bfloat16()
    w, sf = random_codes(N, K, device="cpu"), random_scale(3, 2, dtype=torch.uint8, device="cpu")
    return x, residual, torch.rand(K).bfloat16(), w, sf


def linear(x, w, sf):
    return OPS.linear(x, w, sf, None, None, GRAN, "ue8m0")


def fused(function, arguments):
    """How many norms were taken; the results are those of before."""
    graph = make_fx(function, tracing_mode="symbolic")(*arguments)
    wanted = graph(*arguments)
    before = sum(node.target is OPS.linear.default for node in graph.graph.nodes)
    fusion.fuse(graph.graph)
    graph.graph.lint()
    graph.recompile()
    found = graph(*arguments)
    assert len(found) == len(wanted) and all(map(same_bits, found, wanted))
    for node in graph.graph.nodes:  # what later passes of vLLM ask for
        if node.target in (OPS.norm_linear.default, getitem):
            assert "val" in node.meta
    taken = sum(node.target is OPS.norm_linear.default for node in graph.graph.nodes)
    left = sum(node.target is OPS.linear.default for node in graph.graph.nodes)
    assert taken + left == before
    return taken


def plain(x, residual, weight, w, sf):
    return [linear(ir.ops.rms_norm(x, weight, EPS), w, sf)]


def with_sum(x, residual, weight, w, sf):
    normed, total = ir.ops.fused_add_rms_norm(x, residual, weight, EPS)
    return [total + 1, linear(normed.view(-1, K), w, sf), total]


def read_again(x, residual, weight, w, sf):
    normed, total = ir.ops.fused_add_rms_norm(x, residual, weight, EPS)
    early = normed * 2  # before the layer
    return [early, linear(normed.reshape(-1, K), w, sf), total, normed.view(-1, K) - 1]


def of_two_layers(x, residual, weight, w, sf):
    normed = ir.ops.rms_norm(x, weight, EPS)
    return [linear(normed, w, sf), linear(normed, w, sf + 1)]


def sum_unused(x, residual, weight, w, sf):
    return [linear(ir.ops.fused_add_rms_norm(x, residual, weight, EPS)[0], w, sf)]


def lowered(x, residual, weight, w, sf):
    normed, total = OPS.add_rms_norm(x, weight, EPS, residual)
    return [linear(normed, w, sf), total]


@pytest.mark.parametrize(
    ("function", "taken"),
    [(plain, 1), (with_sum, 1), (read_again, 1), (of_two_layers, 1), (sum_unused, 1), (lowered, 1)],
)
def test_a_norm_is_taken(config, function, taken):
    assert fused(function, operands()) == taken


def two_in_a_row(x, residual, weight, w, sf):
    normed, total = ir.ops.fused_add_rms_norm(x, residual, weight, EPS)
    between = linear(normed, w, sf)[:, :K]
    return [linear(ir.ops.rms_norm(between, weight, EPS), w, sf), total]


def test_norms_of_strided_rows_too(config):
    """As q_a_layernorm's, of a part of a product's columns."""
    assert fused(two_in_a_row, operands()) == 2


def the_sum_is_read(x, residual, weight, w, sf):
    return [linear(ir.ops.fused_add_rms_norm(x, residual, weight, EPS)[1], w, sf)]


def weights_computed(x, residual, weight, w, sf):
    normed = ir.ops.rms_norm(x, weight, EPS)
    return [linear(normed, w, (normed.sum() > 0).to(torch.uint8) + sf)]


def other_shape(x, residual, weight, w, sf):
    return [linear(ir.ops.rms_norm(x, weight, EPS).view(-1, K // 2), w[:, : K // 2], sf[:, :1])]


def another_variance(x, residual, weight, w, sf):
    return [linear(ir.ops.rms_norm(x, weight, EPS, K // 2), w, sf)]


@pytest.mark.parametrize(
    "function", [the_sum_is_read, weights_computed, other_shape, another_variance]
)
def test_what_is_left(config, function):
    assert fused(function, operands()) == 0


def test_norms_that_are_not_ours_are_left(config):
    for op in NORMS:
        getattr(ir.ops, op).set_default(["native"])
    assert fused(plain, operands()) == fused(with_sum, operands()) == 0


def test_it_is_installed_once_and_in_the_key(config):
    passes = config.compilation_config.inductor_compile_config
    before = config.compilation_config.compute_hash()
    fusion.install()
    ours = passes[compat.GRAPH_PASS]
    fusion.install()
    assert passes[compat.GRAPH_PASS] is ours and ours.callable is fusion.fuse
    assert config.compilation_config.compute_hash() != before


def test_the_users_pass_stays(config):
    passes = config.compilation_config.inductor_compile_config
    passes[compat.GRAPH_PASS] = theirs = object()
    fusion.install()
    assert passes[compat.GRAPH_PASS] is theirs
