"""MLA's rotary embedding as one operator, in graphs as vLLM gives them."""

import pytest
import torch
from graphs_of_layers import EPS, L, M, N, Q, R, config, fused, linear, operands
from vllm import ir
from vllm.model_executor.layers.rotary_embedding.deepseek_scaling_rope import (
    DeepseekScalingRotaryEmbedding,
)

from vllm_ue8m0.plugin.mla_cache import ROTARY

__all__ = ["config"]
HEADS, D = 4, N // 4


def layer(dtype=torch.bfloat16, table=torch.bfloat16):
    """qkv, the norms' weights, w, sf, positions, cosines and sines."""
    *_, w, sf = operands()
    qkv, ids = torch.randn(M, Q + L + R).to(dtype), torch.randint(50, (M,))
    return qkv, torch.rand(Q).to(dtype), torch.rand(L), w, sf, ids, torch.randn(50, R).to(table)


def attention(q, kv, k):
    return [q * 2, kv + 1, k * 2]


def latent(qkv, q_weight, kv_weight, w, sf):
    q, kv, k = (qkv + 1).split([Q, L, R], dim=-1)
    q = linear(ir.ops.rms_norm(q, q_weight, EPS), w, sf)
    return q.view(-1, HEADS, D), ir.ops.rms_norm(kv, kv_weight, EPS), k.unsqueeze(1)


def rotated(ids, q, k, table, neox=False):
    return DeepseekScalingRotaryEmbedding.forward_static(ids, q, k, R, R, table, neox)


def as_served(*arguments):
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    q[..., D - R :], k = rotated(ids, q[..., D - R :], k, table)
    return attention(q, kv, k)


def read_often(*arguments):
    """The results, and the positions' cosines."""
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    q[..., D - R :], k = rotated(ids, q[..., D - R :], k, table)
    return [*attention(q, kv, k), k + 1, k.squeeze(1) * 3, q[:, 1], table[ids] * 2]


@pytest.mark.parametrize("function", [as_served, read_often])
def test_it_is_taken(config, function):
    """With the bits of vLLM's own outside of a compiled graph."""
    assert fused(function, layer(), ROTARY) == 1


def by_halves(*arguments):
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    q[..., D - R :], k = rotated(ids, q[..., D - R :], k, table, neox=True)
    return attention(q, kv, k)


def queries_read_before(*arguments):
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    before = q[..., -1] + 1
    q[..., D - R :], k = rotated(ids, q[..., D - R :], k, table)
    return [*attention(q, kv, k), before]


def keys_read_before(*arguments):
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    before = k - 1
    q[..., D - R :], k = rotated(ids, q[..., D - R :], k, table)
    return [*attention(q, kv, k), before]


def keys_as_they_are(*arguments):
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    q[..., D - R :], _ = rotated(ids, q[..., D - R :], k, table)
    return attention(q, kv, k)


def keys_elsewhere(*arguments):
    """At other positions than the queries."""
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    q[..., D - R :], _ = rotated(ids, q[..., D - R :], k, table)
    _, k = rotated((ids + 1) % 50, q[..., D - R :], k, table)
    return attention(q, kv, k)


def keys_weighted(*arguments):
    """By an input of the graph, beside positions and table."""
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    q[..., D - R :], k = rotated(ids, q[..., D - R :], k * given[1][:R], table)
    return attention(q, kv, k)


def nearly(*arguments):
    """A hundredth more, which must not be lost."""
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    q[..., D - R :], k = rotated(ids, q[..., D - R :], k, table * 1.01)
    return attention(q, kv, k)


def first_columns(*arguments):
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    q[..., :R], k = rotated(ids, q[..., :R], k, table)
    return attention(q, kv, k)


def scaled(*arguments):
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    q[..., D - R :], k = rotated(ids, q[..., D - R :] * 2, k, table)
    return attention(q, kv, k)


@pytest.mark.parametrize(
    "function",
    [
        by_halves, queries_read_before, keys_read_before, keys_as_they_are, keys_elsewhere,
        keys_weighted, nearly, first_columns, scaled,
    ],
)  # fmt: skip
def test_others_are_left(config, function):
    assert fused(function, layer(), ROTARY) == 0


def float_table(*arguments):
    *given, ids, table = arguments
    q, kv, k = latent(*given)
    turned, k = rotated(ids, q[..., D - R :], k, table)
    q[..., D - R :] = turned.to(q.dtype)
    return attention(q, kv, k)


def test_a_table_of_another_dtype_is_left(config):
    """Products are rounded to it then."""
    arguments = layer(table=torch.float32)
    assert fused(float_table, arguments, ROTARY) == 0
