"""The batched format: vLLM's kernel around this project's experts, with its all-to-all classes."""

import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from checks import calc_diff, same_bits

pytest.importorskip("vllm")
from moe_layers import Fabric, checkpoint, create, load, manager, moe_config, run, tokens
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import all2all_utils, eep_reconfigure
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts, FusedMoEKernel
from vllm.model_executor.layers.fused_moe.prepare_finalize.batched import BatchedPrepareAndFinalize
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

from vllm_ue8m0 import dispatch
from vllm_ue8m0.plugin import compat
from vllm_ue8m0.plugin.experts import Ue8m0BatchedExperts, Ue8m0Experts

HIDDEN = 2048  # the smallest that the low-latency all-to-alls know
RANKS, MAX_TOKENS = 2, 8
BACKENDS = {"deepep_low_latency": ("deep_ep", "deepep_ll"), "nixl_ep": ("nixl_ep", "nixl_ep")}


@pytest.fixture(autouse=True)
def vllm_config():
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def all2all(monkeypatch):
    """all2all(backend, fabric): vLLM's classes for it, on a stand-in for the library."""

    def prepare(backend, fabric):
        library, name = BACKENDS[backend]
        stub = ModuleType(library)
        stub.Buffer, stub.topk_idx_t = object, torch.int64
        monkeypatch.setitem(sys.modules, library, stub)
        package = "vllm.model_executor.layers.fused_moe.prepare_finalize"
        monkeypatch.delitem(sys.modules, f"{package}.{name}", raising=False)
        module = __import__(f"{package}.{name}", fromlist=["_"])
        monkeypatch.delitem(sys.modules, f"{package}.{name}")
        for attribute in vars(module):
            if attribute.endswith(("PrepareAndFinalize", "_QUANT_BLOCK_SHAPE")):
                value = getattr(module, attribute)
                monkeypatch.setattr(all2all_utils, attribute, value, raising=False)

    return prepare


def build(rank, backend, fabric, monkeypatch, weights, **options):
    monkeypatch.setattr(all2all_utils, "get_ep_all2all_manager", lambda: manager(fabric, rank))
    moe = moe_config(HIDDEN, RANKS, rank, backend, max_num_tokens=MAX_TOKENS)
    method, layer = create(moe, **options)
    load(method, layer, weights)
    return method, layer


@pytest.mark.parametrize("options", [{"scale_fmt": "ue8m0"}, {"activation_scale": "none"}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_exchange_bf16_tokens(monkeypatch, all2all, backend, options):
    """Two ranks with half of the experts each give what one with all of them gives."""
    room = 3 if backend == "nixl_ep" else RANKS  # NIXL: for more ranks than there are
    fabric, weights = Fabric(RANKS, room), checkpoint(HIDDEN)
    all2all(backend, fabric)
    ranks = [build(r, backend, fabric, monkeypatch, weights, **options) for r in range(RANKS)]
    for method, _ in ranks:
        experts = method.moe_kernel.fused_experts
        assert type(experts) is Ue8m0BatchedExperts
        assert (experts.max_num_tokens, experts.num_dispatchers) == (MAX_TOKENS, room)
        assert not method.moe_kernel.prepare_finalize.use_fp8_dispatch

    single, whole = create(moe_config(HIDDEN), **options)
    load(single, whole, weights)
    assert type(single.moe_kernel.fused_experts) is Ue8m0Experts

    batches = [tokens(M, HIDDEN) for M in (5, 8)]
    batches[0][2][1, 0] = -1  # padding
    found = fabric.run(lambda rank: run(*ranks[rank], *batches[rank]))
    assert len(fabric.flags) == RANKS
    for flags in fabric.flags:
        assert not (flags["use_fp8"] or flags["round_scale"] or flags["use_ue8m0"])
    for batch, out in zip(batches, found, strict=True):
        wanted = run(single, whole, *batch)
        assert out.dtype == wanted.dtype == torch.bfloat16 and wanted.isfinite().all()
        # Products are rounded to bf16 before their weight, not after.
        assert calc_diff(out.double().numpy(), wanted.double().numpy()) < 2e-5


def test_local_reorganization_counts_experts_of_all_ranks():
    """vLLM's own torch class, whose ranks' results add up."""
    moe, weights, batch = moe_config(), checkpoint(c=1.25), tokens(6)
    single, whole = create(moe, scale_fmt="ue8m0")
    load(single, whole, weights)
    total = torch.zeros(6, 256)
    for rank in range(RANKS):
        method, layer = create(moe_config(ranks=RANKS, rank=rank), scale_fmt="ue8m0")
        method._build_kernel = lambda layer: None
        load(method, layer, weights)
        pf = BatchedPrepareAndFinalize(MAX_TOKENS, layer.local_num_experts, 1, rank)
        qc = method.get_fused_moe_quant_config(layer)
        experts = Ue8m0BatchedExperts(method.moe, qc, max_num_tokens=MAX_TOKENS, num_dispatchers=1)
        method.moe_kernel = FusedMoEKernel(pf, experts)
        total += run(method, layer, *batch).float()
    wanted = run(single, whole, *batch)
    assert calc_diff(total.double().numpy(), wanted.double().numpy()) < 5e-5


def test_contract():
    """What vLLM asks of a class for the batched format."""
    moe = moe_config(ranks=RANKS)
    method, layer = create(moe)
    method._build_kernel = lambda layer: None
    load(method, layer, checkpoint())
    qc = method.get_fused_moe_quant_config(layer)
    cls, form = Ue8m0BatchedExperts, compat.FusedMoEActivationFormat
    assert inspect.signature(cls.__init__) == inspect.signature(FusedMoEExperts.__init__)
    assert cls.is_supported_config(cls, moe, None, None, form.BatchedExperts) == (True, None)
    ok, reason = cls.is_supported_config(cls, moe, None, None, form.Standard)
    assert not ok and "activation format" in reason
    with pytest.raises(ValueError, match="max_num_tokens and num_dispatchers must be set"):
        cls(moe_config=moe, quant_config=qc)
    experts = cls(moe_config=moe, quant_config=qc, max_num_tokens=8, num_dispatchers=2)
    assert isinstance(experts.finalize_weight_and_reduce_impl(), TopKWeightAndReduceDelegate)
    shapes = experts.workspace_shapes(16, 256, 256, 2, 4, 2, None, moe.activation)
    assert shapes == ((0,), (0,), (2, 16, 256))
    assert not experts.expects_unquantized_inputs  # DeepEP and NIXL would refuse it
    assert not experts.supports_packed_ue8m0_act_scales()
    assert (qc.quant_dtype, qc.block_shape, qc.a1_scale, qc.a2_scale) == (None,) * 4


def test_elastic_expert_parallelism_can_make_new_ones():
    moe = moe_config(ranks=RANKS)
    method, layer = create(moe)
    method._build_kernel = lambda layer: None
    load(method, layer, checkpoint())
    method.moe_quant_config = method.get_fused_moe_quant_config(layer)
    pf = BatchedPrepareAndFinalize(MAX_TOKENS, 2, 1, 0)
    first = Ue8m0BatchedExperts(moe, method.moe_quant_config, MAX_TOKENS, 1)
    again = eep_reconfigure._make_eep_experts(method, first, pf, moe)
    assert type(again) is Ue8m0BatchedExperts and again.max_num_tokens == MAX_TOKENS


def test_operator_gets_rows_counts_and_factors(monkeypatch):
    """A layer's c and a finer grid reach the operator, with the counts on the device."""
    method, layer = create(moe_config(), scale_fmt="ue8m0")
    load(method, layer, checkpoint(c=1.5))
    experts = Ue8m0BatchedExperts(method.moe, method.moe_quant_config, 8, 1)
    x, counts = torch.randn(4, 8, 256).bfloat16(), torch.tensor([3, 0, 8, 1])
    out = torch.zeros_like(x)
    meta = SimpleNamespace(expert_num_tokens=counts)
    nothing = torch.empty(0)
    experts.apply(
        out, x, layer.w13_weight, layer.w2_weight, nothing, nothing, method.moe.activation, 4,
        None, None, None, nothing, nothing, meta, False,
    )  # fmt: skip
    from vllm_ue8m0 import reference

    wanted = reference.batched_experts(
        x, layer.w13_weight, layer.w13_weight_scale_inv, layer.w13_weight_scale_c,
        layer.w2_weight, layer.w2_weight_scale_inv, layer.w2_weight_scale_c, counts,
        (128, 128), (128, 128), "ue8m0",
    )  # fmt: skip
    assert layer.w13_weight_scale_c is not None
    for e, rows in enumerate(counts.tolist()):
        assert same_bits(out[e, :rows], wanted[e, :rows])


def test_padded_hidden_size_is_refused():
    moe = moe_config(HIDDEN)
    moe.hidden_dim_unpadded = 1920
    with pytest.raises(NotImplementedError, match=r"hidden sizes of 2048.*1920.*--all2all-backend"):
        create(moe)


@pytest.mark.parametrize(
    ("platform", "backend", "held"),
    [("cuda", "auto", True), ("cuda", "reference", False), ("cpu", "auto", False)],
)
@pytest.mark.parametrize("cls", [Ue8m0Experts, Ue8m0BatchedExperts])
def test_batch_invariance_where_kernels_run(monkeypatch, cls, platform, backend, held):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    monkeypatch.setattr(compat, "platform", lambda: platform)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setenv("UE8M0_BACKEND", backend)
    dispatch.choose.cache_clear()
    try:
        found = cls.is_supported_config(cls, moe_config(), None, None, cls.activation_format())
    finally:
        dispatch.choose.cache_clear()
    assert found == ((True, None) if held else (False, "kernel does not support batch invariance"))
