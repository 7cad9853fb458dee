"""Expert load balancing: what vLLM moves between ranks is all that the experts are."""

import numpy as np
import pytest
import torch
from checks import same_bits

pytest.importorskip("vllm")
from moe_layers import E, Fabric, Mover, checkpoint, create, load, moe_config, run, tokens
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.eplb import rebalance_execute
from vllm.model_executor.layers.fused_moe import RoutedExperts

from vllm_ue8m0 import reference
from vllm_ue8m0.formats import QuantSpec
from vllm_ue8m0.plugin.weights import encode, uniform

U8, F32, E4M3 = torch.uint8, torch.float32, torch.float8_e4m3fn
C = 1.3228756189346313  # the factor in DeepSeek-V3.1's o_proj scales
UE8M0 = {"scale_fmt": "ue8m0"}


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


def balanced(weights, eplb=True, ranks=1, rank=0, **options):
    method, layer = create(moe_config(ranks=ranks, rank=rank, eplb=eplb), **options)
    method._build_kernel = method._build_kernel if ranks == 1 else lambda layer: None
    load(method, layer, weights)
    return method, layer


def moved(layer):
    """What vLLM's load balancer moves, [experts, -1] each."""
    return list(RoutedExperts.get_expert_weights(layer))


@pytest.mark.parametrize("options", [UE8M0, {}], ids=["bytes", "float32"])
def test_permuted_experts_give_the_same(options):
    method, layer = balanced(checkpoint(c=torch.rand(E, 1, 1) + 1), **options)
    x, weights, ids = tokens(9)
    before = run(method, layer, x, weights, ids)
    order = torch.tensor([2, 0, 3, 1])
    tensors = moved(layer)
    assert len(tensors) == (6 if options else 4)
    for tensor in tensors:  # in place, as vLLM does
        rows = tensor.view(U8) if tensor.dtype == E4M3 else tensor
        rows.copy_(rows[order])
    assert not same_bits(run(method, layer, x, weights, ids), before)
    assert same_bits(run(method, layer, x, weights, order.argsort()[ids]), before)


def test_parameters_of_all_layers_pair():
    """vLLM moves every layer through buffers that it makes for the first: names, order, dtypes."""
    kinds = [checkpoint(), checkpoint(c=C), checkpoint(spread=0.3)]
    for options, layers in ((UE8M0, kinds[:2]), ({}, kinds), ({"non_pow2": "requant"}, kinds)):
        found = set()
        for weights in layers:
            _, layer = balanced(weights, **options)
            names = [name for name, _ in layer.named_parameters()]
            found.add(
                tuple((n, t.shape, t.dtype) for n, t in zip(names, moved(layer), strict=True))
            )
        assert len(found) == 1
    _, plain = balanced(kinds[1], eplb=False)
    assert plain.w13_weight_scale_inv.dtype == U8  # the rule is load balancing's alone


def values(layer, name):
    """The float32 weights that a layer's experts have."""
    w, sf, c = (getattr(layer, f"{name}_weight{part}") for part in ("", "_scale_inv", "_scale_c"))
    return reference.dequantize(w.data, sf, (128, 128), c)


@pytest.mark.parametrize("options", [UE8M0, {}], ids=["bytes", "float32"])
def test_vllm_moves_layers_of_different_scales(options):
    """Its own mover, between two ranks, through the first layer's buffers."""
    old, new = np.array([0, 1, 2, 3]), np.array([2, 0, 3, 3])
    kinds = [checkpoint(), checkpoint(c=C), checkpoint(spread=0.0 if options else 0.3)]
    ranks = [
        [balanced(weights, ranks=2, rank=rank, **options)[1] for weights in kinds]
        for rank in range(2)
    ]
    fabric = Fabric(2)

    def move(rank):
        buffers = [torch.empty_like(tensor) for tensor in moved(ranks[rank][0])]
        for index, layer in enumerate(ranks[rank]):
            tensors = moved(layer)
            done = rebalance_execute.move_to_buffer(
                2, old, new, tensors, buffers, None, rank, Mover(fabric, rank), index
            )
            rebalance_execute.move_from_buffer(tensors, buffers, done, new, rank)

    fabric.run(move)
    for index, weights in enumerate(kinds):
        for name, (codes, scale) in weights.items():
            found = torch.cat([values(layers[index], name) for layers in ranks])
            assert torch.equal(found, reference.dequantize(codes, scale, (128, 128))[new])


@pytest.mark.parametrize("options", [UE8M0, {}, {**UE8M0, "non_pow2": "requant"}])
@pytest.mark.parametrize("c", [1.0, C])
def test_values_are_those_without_load_balancing(options, c):
    weights = checkpoint(c=c)
    dense = []
    for eplb in (True, False):
        dense.append(values(balanced(weights, eplb, **options)[1], "w13"))
    assert torch.equal(dense[0], dense[1])
    assert torch.equal(dense[0], reference.dequantize(*weights["w13"], (128, 128)))


def test_scales_that_are_not_as_declared_are_refused_by_name():
    with pytest.raises(ValueError, match=r"experts\.w13: .*scale_fmt ue8m0.*--enable-eplb"):
        balanced(checkpoint(spread=0.3), **UE8M0)


def test_zero_blocks_stay_finite():
    w = torch.zeros(1, 128, 128).to(E4M3)
    done = encode(w, torch.zeros(1, 1, 1), [1], (128, 128), "keep", "layer")
    spec = QuantSpec(scale_fmt=None)
    assert uniform(done, spec, "layer").sf.isfinite().all()
