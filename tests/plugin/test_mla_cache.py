"""Who writes MLA's cache rows: the rotation, or vLLM where it has to."""

from types import SimpleNamespace

import pytest
import torch
from checks import same_bits

pytest.importorskip("vllm")
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

from vllm_ue8m0 import reference
from vllm_ue8m0.plugin import mla_cache

M, H, D, L, R, S = 5, 2, 24, 16, 8, 4
LAYER = "model.layers.3.self_attn"


class Counting(CPUMLAImpl):
    """vLLM's own writing, counted."""

    def __init__(self):
        self.calls = 0

    def __getattribute__(self, name):
        if name == "do_kv_cache_update" and name not in vars(self):
            self.calls += 1
        return super().__getattribute__(name)


@pytest.fixture
def step():
    """A layer's tensors, its attention and the context of a step."""
    layer = SimpleNamespace(impl=Counting(), kv_cache=torch.randn(3, S, L + R).bfloat16())
    slots = {f"{LAYER}.attn": torch.tensor([7, 0, -1, 11, 4])}
    context = ForwardContext(
        no_compile_layers={f"{LAYER}.attn": layer}, attn_metadata=None, slot_mapping=slots
    )
    w = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    mla_cache.register(w, f"{LAYER}.q_b_proj")
    given = [
        torch.randn(M, H, D).bfloat16(), torch.randn(M, R).bfloat16(), torch.arange(M),
        torch.randn(9, R).bfloat16(), torch.randn(M, L).bfloat16(), w,
    ]  # fmt: skip
    return SimpleNamespace(layer=layer, slots=slots, context=context, given=given)


def run(step, change_slots=None):
    """The rotation, then what vLLM calls; (cache as it should be, after the one, after both)."""
    q, k, positions, table, latent, _ = step.given
    wanted = step.layer.kv_cache.clone()
    turned = k.clone()
    own = step.slots[f"{LAYER}.attn"]
    reference.rotary_embedding(q.clone(), turned, positions, table, latent, wanted, own)
    mla_cache.ROTARY(*step.given)
    assert same_bits(k, turned)
    between = step.layer.kv_cache.clone()
    slots = own if change_slots is None else change_slots(own)
    update = step.layer.impl.do_kv_cache_update
    update(latent, k[:, None], step.layer.kv_cache, slots, "auto", torch.ones(()))
    return wanted, between, step.layer.kv_cache


def test_the_rotation_writes_and_vllm_does_not(step):
    with override_forward_context(step.context):
        for steps in (1, 2):
            wanted, between, after = run(step)
            assert same_bits(between, wanted) and same_bits(after, wanted)
            assert not same_bits(wanted[1], torch.zeros_like(wanted[1]))
            step.layer.kv_cache.zero_()
            assert step.layer.impl.calls == 1, steps  # taken once, to be called where needed


@pytest.mark.parametrize(
    "change",
    [
        lambda step: mla_cache.register(step.given[-1], "model.layers.9.self_attn.q_b_proj"),
        lambda step: setattr(step.layer, "use_pcp", True),
        lambda step: setattr(step.layer, "hisparse_cache", object()),
        lambda step: setattr(step.layer, "hisparse_cache", {}),
        lambda step: setattr(step.context, "slot_mapping", [step.slots]),
        lambda step: setattr(Counting, "do_kv_cache_update", write_otherwise),
    ],
    ids=[
        "another layer",
        "context parallel",
        "hisparse",
        "empty",
        "two batches",
        "another backend",
    ],
)
def test_vllm_writes_where_something_differs(step, change, monkeypatch):
    monkeypatch.setattr(Counting, "do_kv_cache_update", CPUMLAImpl.do_kv_cache_update)
    change(step)
    with override_forward_context(step.context):
        before = step.layer.kv_cache.clone()
        wanted, between, after = run(step)
    assert same_bits(between, before) and same_bits(after, wanted)
    assert not isinstance(step.layer.impl.do_kv_cache_update, mla_cache._Update)


def write_otherwise(self, *args):
    return CPUMLAImpl.do_kv_cache_update(self, *args)


def test_caches_of_another_dtype_are_vllms(step):
    step.layer.kv_cache = step.layer.kv_cache.to(torch.float16)
    with override_forward_context(step.context):
        before = step.layer.kv_cache.clone()
        mla_cache.ROTARY(*step.given)
    assert same_bits(step.layer.kv_cache, before)


def test_without_a_step(step):
    before = step.layer.kv_cache.clone()
    mla_cache.ROTARY(*step.given)
    assert same_bits(step.layer.kv_cache, before)


def test_a_note_is_for_those_rows_once(step):
    """What comes with other slots, or a second time, is written by vLLM."""
    with override_forward_context(step.context):
        wanted, _, after = run(step, change_slots=lambda slots: slots.flip(0).clone())
        assert not same_bits(after, wanted)
        run(step)
        latent, k = step.given[4], step.given[1]
        step.layer.kv_cache.zero_()
        step.layer.impl.do_kv_cache_update(
            latent, k[:, None], step.layer.kv_cache, step.slots[f"{LAYER}.attn"], "auto", None
        )
        assert step.layer.kv_cache.any()


def test_a_note_does_not_outlive_its_step(step):
    """One that ends before vLLM writes; in the next one vLLM has to."""
    _, k, *_, latent, _ = step.given
    with override_forward_context(step.context):
        mla_cache.ROTARY(*step.given)
    mla_cache.ROTARY(*step.given)
    step.layer.kv_cache.zero_()
    slots = step.slots[f"{LAYER}.attn"]
    step.layer.impl.do_kv_cache_update(latent, k[:, None], step.layer.kv_cache, slots, "auto", None)
    assert step.layer.kv_cache.any()


@pytest.mark.parametrize("mode", [CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE])
def test_in_a_captured_piece_vllm_writes(step, mode, monkeypatch):
    """Its slots may be elsewhere when the piece is replayed; those of a full graph are not."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    slots = SimpleNamespace(is_cuda=True)
    step.context.slot_mapping = {f"{LAYER}.attn": slots}
    step.context.cudagraph_runtime_mode = mode
    from vllm_ue8m0.plugin import compat

    with override_forward_context(step.context):
        found = compat.mla_cache(f"{LAYER}.attn")
    assert (found is None) == (mode == CUDAGraphMode.PIECEWISE)
    assert found is None or found == (step.layer.impl, step.layer.kv_cache, slots)
