"""Graphs as vLLM gives them to the pass that takes norms and activations into linear layers."""

from operator import getitem

import pytest
import torch
from checks import random_codes, random_scale, same_bits

pytest.importorskip("vllm")
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from vllm import ir
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_ue8m0.library import OPS
from vllm_ue8m0.plugin import fusion, mla_cache, norms

EPS, GRAN = 1e-6, (128, 128)
SCATTER = torch.ops.aten.slice_scatter.default  # that MLA's rotary embedding needs
NORMS = ("rms_norm", "fused_add_rms_norm")
M, K, N = 5, 256, 384
Q, L, R = 256, 128, 64  # columns of compressed queries; of keys and values; of keys' rotary part


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


def fused(function, arguments, into=OPS.norm_linear.default):
    """How many linear layers became `into`, in a graph for any M; the results are those before."""
    counts, left_behind = [], []

    def compile(graph, _):
        before = sum(node.target is OPS.linear.default for node in graph.graph.nodes)
        fusion.fuse(graph.graph)
        left_behind.extend(node for node in graph.graph.nodes if node.target is SCATTER)
        graph.graph.eliminate_dead_code()  # as vLLM does after all passes
        graph.graph.lint()
        graph.recompile()
        targets = [node.target for node in graph.graph.nodes]
        counts.append((before, targets.count(into), targets.count(OPS.linear.default)))
        for node in graph.graph.nodes:  # what later passes of vLLM ask for
            assert node.target not in (into, getitem) or "val" in node.meta
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compile, decompositions=select_decomp_table())
    for x in arguments:
        if len(x) == M:
            torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad():
        wanted = function(*arguments)
        found = torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert same_bits(one, other)
    ((before, taken, left),) = counts
    assert not taken or into is not mla_cache.ROTARY or not left_behind
    assert taken + left <= before
    return taken
