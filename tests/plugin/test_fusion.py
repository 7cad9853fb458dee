"""The pass that takes norms and activations into linear layers, on graphs as vLLM gives them."""

import sys
from operator import getitem

import pytest
import torch

pytest.importorskip("vllm")
from graphs_of_layers import (
    EPS,
    NORMS,
    K,
    L,
    M,
    Q,
    R,
    config,
    fused,
    linear,
    operands,
)
from torch.fx.experimental.proxy_tensor import make_fx
from vllm import ir

from vllm_ue8m0.library import OPS
from vllm_ue8m0.plugin import compat, fusion

__all__ = ["config"]


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


def experts_sum(x, residual, weight, w, sf):
    """As of vLLM's experts: shared ones + routed ones * factor."""
    routed, shared = x * x, x - 1
    normed, total = ir.ops.fused_add_rms_norm(shared + routed * 2.5, residual, weight, EPS)
    return [linear(normed, w, sf), total, shared * 2]


def experts_sum_in_shapes(x, residual, weight, w, sf):
    total = ((x * x) * 0.3).view(-1, K) + (x - 1)
    return [linear(ir.ops.rms_norm(total.view(-1, K), weight, EPS), w, sf)]


def sum_read_again(x, residual, weight, w, sf):
    total = (x * x) * 2.5 + (x - 1)
    return [linear(ir.ops.rms_norm(total, weight, EPS), w, sf), total]


def sum_of_other_factor(x, residual, weight, w, sf):
    return [linear(ir.ops.rms_norm((x * x) * x + (x - 1), weight, EPS), w, sf)]


def sum_with_number(x, residual, weight, w, sf):
    return [linear(ir.ops.rms_norm((x * x) * 2.5 + 1, weight, EPS), w, sf)]


def sum_of_a_row(x, residual, weight, w, sf):
    return [linear(ir.ops.rms_norm(x * 2.5 + weight, weight, EPS), w, sf)]


def sum_with_alpha(x, residual, weight, w, sf):
    return [linear(ir.ops.rms_norm(torch.add(x - 1, x * 2.5, alpha=2), weight, EPS), w, sf)]


@pytest.mark.parametrize(
    ("function", "taken"),
    [
        (experts_sum, 1),
        (experts_sum_in_shapes, 1),
        (sum_read_again, 0),
        (sum_of_other_factor, 0),
        (sum_with_number, 0),
        (sum_of_a_row, 0),
        (sum_with_alpha, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_of_experts_is_taken(config, monkeypatch, function, taken, dtype):
    """With its norm, in 16 bits, where both steps are rounded."""
    sums, found = [], fusion._experts_sum
    monkeypatch.setattr(fusion, "_experts_sum", lambda node: sums.append(found(node)) or sums[-1])
    x, residual, weight, w, sf = operands()
    assert fused(function, (x.to(dtype), residual.to(dtype), weight, w, sf)) == 1
    assert [total is not None for total in sums] == [bool(taken and dtype == torch.bfloat16)]


def latent_operands():
    """qkv, the norms' weights, w, sf."""
    *_, w, sf = operands()
    return torch.randn(M, Q + L + R).bfloat16(), torch.rand(Q).bfloat16(), torch.rand(L), w, sf


def latent(qkv, q_weight, kv_weight, w, sf):
    """As vLLM's MLA."""
    q, kv = (qkv + 1).split([Q, L + R], dim=-1)
    q = linear(ir.ops.rms_norm(q, q_weight, EPS), w, sf)
    kv, k = kv.split([L, R], dim=-1)
    return [q[:, ::2] * 2, ir.ops.rms_norm(kv, kv_weight, 2 * EPS), k.unsqueeze(1) * 2]


def latent_sliced(qkv, q_weight, kv_weight, w, sf):
    """Keys first, lowered, and the rest unused."""
    qkv = qkv + 1
    (kv,) = OPS.add_rms_norm(qkv[:, Q : Q + L], kv_weight, EPS)
    return [kv, linear(ir.ops.rms_norm(qkv[:, :Q], q_weight, EPS), w, sf)]


def latent_read_again(qkv, q_weight, kv_weight, w, sf):
    """The rows and their rotary part by others too, and before."""
    qkv = qkv + 1
    early = qkv[:, -R:].sum()
    q, kv, k = qkv.split([Q, L, R], dim=-1)
    kv = ir.ops.rms_norm(kv, kv_weight, EPS)
    return [linear(ir.ops.rms_norm(q, q_weight, EPS), w, sf) + early, kv, kv - 1, qkv - 1, k + 1]


@pytest.mark.parametrize("function", [latent, latent_sliced, latent_read_again])
def test_both_norms_of_a_latent_are_taken(config, function):
    assert fused(function, latent_operands(), OPS.latent_linear.default) == 1


def latent_lowered(qkv, q_weight, kv_weight, w, sf):
    q, kv = qkv.split([Q, L + R], dim=-1)
    kv, k = kv.split([L, R], dim=-1)
    (q,) = OPS.add_rms_norm(q, q_weight, EPS)
    return [linear(q, w, sf), *OPS.add_rms_norm(kv, kv_weight, EPS), k * 2]


def test_all_of_a_latent_is_read_behind_the_layer(config):
    """Nothing else reads the rows, so that nothing may come between them and the layer.

    They may be given to the graph, before its weights.
    """
    graph = make_fx(latent_lowered, tracing_mode="fake")(*latent_operands()).graph
    fusion.fuse(graph)
    graph.eliminate_dead_code()
    graph.lint()
    rows = next(node for node in graph.nodes if node.op == "placeholder")
    assert [node.target for node in rows.users] == [OPS.latent_linear.default]


def queries_read_again(qkv, q_weight, kv_weight, w, sf):
    """As by the indexer of DeepSeek-V3.2."""
    q, kv, k = (qkv + 1).split([Q, L, R], dim=-1)
    q = ir.ops.rms_norm(q, q_weight, EPS)
    return [linear(q, w, sf), ir.ops.rms_norm(kv, kv_weight, EPS), k + 1, q + 1]


def other_columns(qkv, q_weight, kv_weight, w, sf):
    qkv = qkv + 1
    kv = ir.ops.rms_norm(qkv[:, Q + 1 : Q + 1 + L], kv_weight, EPS)
    return [linear(ir.ops.rms_norm(qkv[:, :Q], q_weight, EPS), w, sf), kv]


def every_other_column(qkv, q_weight, kv_weight, w, sf):
    qkv = torch.cat([qkv, qkv], 1)
    kv = ir.ops.rms_norm(qkv[:, Q : Q + 2 * L : 2], kv_weight, EPS)
    return [linear(ir.ops.rms_norm(qkv[:, :Q], q_weight, EPS), w, sf), kv]


def other_rows(qkv, q_weight, kv_weight, w, sf):
    qkv = torch.cat([qkv, qkv])
    kv = ir.ops.rms_norm(qkv[len(qkv) // 2 :, Q : Q + L], kv_weight, EPS)
    return [linear(ir.ops.rms_norm(qkv[:, :Q], q_weight, EPS), w, sf), kv]


def first_rows(qkv, q_weight, kv_weight, w, sf):
    qkv = qkv + 1
    kv = ir.ops.rms_norm(qkv[:2, Q : Q + L], kv_weight, EPS)
    return [linear(ir.ops.rms_norm(qkv[:, :Q], q_weight, EPS), w, sf), kv]


def queries_not_first(qkv, q_weight, kv_weight, w, sf):
    qkv = qkv + 1
    kv = ir.ops.rms_norm(qkv[:, Q : Q + L], kv_weight, EPS)
    return [linear(ir.ops.rms_norm(qkv[:, R : R + Q], q_weight, EPS), w, sf), kv]


def two_of_the_keys(qkv, q_weight, kv_weight, w, sf):
    qkv = qkv + 1
    kv = [ir.ops.rms_norm(qkv[:, Q : Q + L], kv_weight, eps) for eps in (EPS, 1.0)]
    return [linear(ir.ops.rms_norm(qkv[:, :Q], q_weight, EPS), w, sf), *kv]


def weight_computed(qkv, q_weight, kv_weight, w, sf):
    q, kv, k = (qkv + 1).split([Q, L, R], dim=-1)
    q = linear(ir.ops.rms_norm(q, q_weight, EPS), w, sf)
    return [q, ir.ops.rms_norm(kv, kv_weight + q.sum(), EPS), k + 1]


def first_weight_computed(qkv, q_weight, kv_weight, w, sf):
    """As norms that add one to their weights."""
    q, kv, k = (qkv + 1).split([Q, L, R], dim=-1)
    q = linear(ir.ops.rms_norm(q, q_weight + 1, EPS), w, sf)
    return [q, ir.ops.rms_norm(kv, kv_weight, EPS), k + 1]


@pytest.mark.parametrize(
    "function",
    [
        queries_read_again,
        other_columns,
        every_other_column,
        other_rows,
        first_rows,
        queries_not_first,
        two_of_the_keys,
        weight_computed,
        first_weight_computed,
    ],
)
def test_other_latents_are_left(config, function):
    assert fused(function, latent_operands(), OPS.latent_linear.default) == 0


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


def test_a_norm_that_is_read_twice_is_left(config):
    """vLLM's graphs have one node for each result; another form is not known."""
    graph = make_fx(lowered)(*operands()).graph
    for node in graph.nodes:
        if node.target is OPS.add_rms_norm.default:
            with graph.inserting_after(node):
                again = graph.call_function(getitem, (node, 0))
    (output,) = [node for node in graph.nodes if node.op == "output"]
    output.args = ([*output.args[0], again],)
    fusion.fuse(graph)
    graph.lint()
    assert OPS.norm_linear.default not in {node.target for node in graph.nodes}


def test_norms_that_are_not_ours_are_left(config):
    for op in NORMS:
        getattr(ir.ops, op).set_default(["native"])
    assert fused(plain, operands()) == fused(with_sum, operands()) == 0


def activation(x):
    from vllm.model_executor.layers.activation import SiluAndMul

    return SiluAndMul.forward_native(x)


def silu_mul(gate_up, w, sf):
    return [linear(activation(gate_up), w, sf)]


def silu_mul_in_shapes(gate_up, w, sf):
    return [linear(activation(gate_up).view(-1, K).reshape(-1, K), w, sf)]


def up_times_silu(gate_up, w, sf):
    gate, up = gate_up.chunk(2, -1)
    return [linear(up * torch.nn.functional.silu(gate), w, sf)]


def test_both_of_an_mlp(config):
    x, residual, weight, w, sf = operands()
    layers = w[:K], sf[:2], w[:, : K // 2].contiguous(), sf[:, :1].contiguous()

    def mlp(x, residual, weight, w13, sf13, w2, sf2):
        normed, total = ir.ops.fused_add_rms_norm(x, residual, weight, EPS)
        return [linear(activation(linear(normed, w13, sf13)), w2, sf2), total]

    arguments = (x, residual, weight, *layers)
    assert fused(mlp, arguments, OPS.silu_mul_linear.default) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("function", [silu_mul, silu_mul_in_shapes, up_times_silu])
def test_an_activation_is_taken(config, function, dtype):
    """Of rows that are parts of longer ones, too."""
    *_, w, sf = operands()
    gate_up = torch.randn(M, 3 * K).to(dtype)[:, : 2 * K]
    assert fused(function, (gate_up, w, sf), OPS.silu_mul_linear.default) == 1


def gelu(gate_up, w, sf):
    gate, up = gate_up.chunk(2, -1)
    return [linear(torch.nn.functional.gelu(gate, approximate="tanh") * up, w, sf)]


def up_first(gate_up, w, sf):
    up, gate = gate_up.chunk(2, -1)
    return [linear(torch.nn.functional.silu(gate) * up, w, sf)]


def limited(gate_up, w, sf):
    gate, up = gate_up.chunk(2, -1)
    return [linear(torch.nn.functional.silu(gate.clamp(max=7)) * up.clamp(-7, 7), w, sf)]


def activation_read_again(gate_up, w, sf):
    activated = activation(gate_up)
    return [linear(activated, w, sf), activated]


def of_two_tensors(gate_up, w, sf):
    other = gate_up.flip(0)
    gate, up = gate_up[:, :K], other[:, K:]
    return [linear(torch.nn.functional.silu(gate) * up, w, sf)]


def of_the_input(gate_up, w, sf):
    return [linear(gate_up[:, :K].contiguous(), w, sf)]


@pytest.mark.parametrize(
    "function", [gelu, up_first, limited, activation_read_again, of_two_tensors, of_the_input]
)
def test_other_activations_are_left(config, function):
    *_, w, sf = operands()
    gate_up = torch.randn(M, 2 * K).bfloat16() * 9
    assert fused(function, (gate_up, w, sf), OPS.silu_mul_linear.default) == 0


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


def test_a_release_without_such_passes_is_served_without(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.compilation.passes.inductor_pass", None)
    warned = []
    monkeypatch.setattr(fusion.logger, "warning", lambda text, *args: warned.append(text % args))
    fusion.install()
    assert compat.GRAPH_PASS not in config.compilation_config.inductor_compile_config
    assert len(warned) == 1 and "inductor_pass" in warned[0]
