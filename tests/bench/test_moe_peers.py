"""vLLM's routed experts as peers: how they are built and called after 0.26, and their absence.

Stand-ins for vLLM's modules compute the layer and check what vLLM's take, so that a wrong operand
or argument shows here without a GPU.
"""

import sys
from enum import Enum
from types import ModuleType

import pytest
import torch
from fake_clock import DEVICE, MACHINE, FakeClock

from vllm_ue8m0 import reference
from vllm_ue8m0.bench import moe, moe_peers, peers
from vllm_ue8m0.bench.roof import Roof
from vllm_ue8m0.bench.run import run

ALL = moe.Layer("TP2", experts=8, local=8, hidden=256, intermediate=128, topk=3)
SOME = moe.Layer("EP4", experts=8, local=2, hidden=256, intermediate=128, topk=3)
MOE = "vllm.model_executor.layers.fused_moe"
GRAN = (128, 128)


class MoEActivation(Enum):
    SILU = "silu"


class RoutingMethodType(Enum):
    DeepSeekV3 = 2


class FusedMoEParallelConfig:
    @staticmethod
    def make_no_parallel():
        return "no parallelism"


class FusedMoEConfig:
    """Takes what vLLM's requires, and nothing else."""

    def __init__(
        self, num_experts, experts_per_token, hidden_dim, intermediate_size, num_local_experts,
        num_logical_experts, activation, device, routing_method, moe_parallel_config, in_dtype,
    ):  # fmt: skip
        assert num_experts == num_logical_experts
        assert (activation, in_dtype) == (MoEActivation.SILU, torch.bfloat16)
        assert moe_parallel_config == "no parallelism"
        self.sizes = (num_experts, num_local_experts, hidden_dim, intermediate_size)
        self.topk = experts_per_token


def fp8_w8a8_moe_quant_config(w1_scale, w2_scale, block_shape):
    assert block_shape == [128, 128]
    assert w1_scale.dtype == w2_scale.dtype == torch.float32
    assert w1_scale.is_contiguous() and w2_scale.is_contiguous()
    return w1_scale, w2_scale


def maybe_make_prepare_finalize(moe, quant_config, allow_new_interface):
    assert allow_new_interface  # None otherwise
    return "prepare and finalize"


class TritonExperts:
    def __init__(self, moe_config, quant_config):
        self.moe, self.quant = moe_config, quant_config


class DeepGemmExperts(TritonExperts):
    pass


class Workspace:
    """vLLM's manager of workspaces, which has to be there when a kernel is applied."""

    made = 0

    def is_workspace_manager_initialized(self):
        return self.made > 0

    def init_workspace_manager(self, device):
        assert isinstance(device, torch.device)
        self.made += 1


def fused_moe_kernel(workspace, ue8m0, used):
    class FusedMoEKernel:
        def __init__(self, prepare_finalize, fused_experts):
            assert prepare_finalize == "prepare and finalize"
            self.experts = fused_experts

        def apply(
            self, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts,
            expert_map, apply_router_weight_on_input,
        ):  # fmt: skip
            assert workspace.made == 1
            assert activation == MoEActivation.SILU and not apply_router_weight_on_input
            assert topk_ids.dtype == torch.int32 and topk_ids.is_contiguous()
            assert topk_weights.dtype == torch.float32
            moe, (w1_scale, w2_scale) = self.experts.moe, self.experts.quant
            assert moe.sizes == (global_num_experts, w1.shape[0], w1.shape[2], w2.shape[2])
            assert moe.topk == topk_ids.shape[1]
            used.append(type(self.experts).__name__)
            ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
            return reference.experts(
                hidden_states, w1, w1_scale, None, w2, w2_scale, None, topk_weights, ids, GRAN,
                GRAN, "ue8m0" if ue8m0 else "fp32", False,
            )  # fmt: skip

    return FusedMoEKernel


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch):
    """Sets vLLM up with one kind of activation scales; gives the names of the classes that ran."""

    def set_up(ue8m0):
        used, workspace = [], Workspace()
        names = {
            f"{MOE}.activation": [MoEActivation],
            f"{MOE}.all2all_utils": [maybe_make_prepare_finalize],
            f"{MOE}.config": [
                FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType, fp8_w8a8_moe_quant_config
            ],
            f"{MOE}.experts.deep_gemm_moe": [DeepGemmExperts],
            f"{MOE}.experts.triton_moe": [TritonExperts],
            f"{MOE}.modular_kernel": [fused_moe_kernel(workspace, ue8m0, used)],
        }  # fmt: skip
        modules = {}

        def module(name):
            parent, _, child = name.rpartition(".")
            found = modules.setdefault(name, ModuleType(name))
            if parent:
                setattr(module(parent), child, found)
            return found

        for name, things in names.items():
            for thing in things:
                setattr(module(name), thing.__name__, thing)
        module("vllm.utils.deep_gemm").is_deep_gemm_e8m0_used = lambda: ue8m0
        module("vllm.v1.worker").workspace = workspace
        for name, stand_in in modules.items():
            monkeypatch.setitem(sys.modules, name, stand_in)
        peers._try.cache_clear()
        return used

    yield set_up
    peers._try.cache_clear()  # what it holds is of the stand-ins


def draw(case):
    generator = torch.Generator().manual_seed(0)
    return {**case.shared.draw(generator), **case.inputs(generator)}


@pytest.mark.parametrize("layer", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize("tokens", [1, 6])
def test_calls_do_the_same_work(vllm, layer: moe.Layer, tokens: int):
    used = vllm(ue8m0=True)
    case = moe.experts(reference, layer, "uniform", tokens)
    inputs = draw(case)
    ours = case.ours(inputs)
    for name in ("vllm_triton", "deepgemm"):
        theirs = case.peers[name](inputs)
        assert torch.equal(theirs[0], ours[0])
        assert case.agree(ours, theirs) is None
    assert used == ["TritonExperts", "DeepGemmExperts"]
    with pytest.raises(peers.PeerAbsent, match="powers of two here; VLLM_USE_DEEP_GEMM_E8M0=0"):
        case.peers["vllm_triton_fp32"](inputs)


def test_float32_activation_scales_have_a_name_of_their_own(vllm):
    vllm(ue8m0=False)
    case = moe.experts(reference, ALL, "uniform", 6)
    inputs = draw(case)
    ours, theirs = case.ours(inputs), case.peers["vllm_triton_fp32"](inputs)
    assert not torch.equal(theirs[0], ours[0])
    assert case.agree(ours, theirs) is None
    for name in ("vllm_triton", "deepgemm"):
        with pytest.raises(peers.PeerAbsent, match="float32 here: DeepGEMM is not installed, or"):
            case.peers[name](inputs)


def test_a_peer_must_do_the_same_work():
    case = moe.experts(reference, ALL, "uniform", 6)
    ours = case.ours(draw(case))
    assert "6 of 6 rows differ" in case.agree(ours, [ours[0].roll(1, 0)])
    assert "6 of 6 rows differ" in case.agree(ours, [ours[0] * 1.25])
    assert "is torch.float32 (6, 256) instead of" in case.agree(ours, [ours[0].float()])


def test_they_are_timed_beside_ours(vllm):
    vllm(ue8m0=True)
    said, times = [], {"ours": 2.0, "peer vllm_triton": 3.0, "peer deepgemm": 4.0}
    case = moe.experts(reference, ALL, "uniform", 2)
    (record,) = run([case], FakeClock(times), MACHINE, said.append, DEVICE, Roof(3.0, 1500.0))
    assert record.peers_us == {"vllm_triton": 3.0, "deepgemm": 4.0}
    assert [
        line for line in said[1:] if "vllm_triton_fp32 of moe_layer is absent: " not in line
    ] == []


def test_one_that_cannot_be_captured_is_said(vllm):
    vllm(ue8m0=True)
    said, errors = [], {"peer deepgemm": RuntimeError("operation not permitted when capturing")}
    case = moe.experts(reference, ALL, "uniform", 2)
    clock = FakeClock(errors=errors)
    (record,) = run([case], clock, MACHINE, said.append, DEVICE, Roof(3.0, 1500.0))
    assert [*record.peers_us] == ["vllm_triton"]
    reason = "not in a CUDA graph: operation not permitted when capturing"
    assert f"peer deepgemm of moe_layer is absent: {reason}" in said


def test_absent_peers_are_said_with_their_reasons(monkeypatch: pytest.MonkeyPatch):
    def absent(what):
        raise peers.PeerAbsent("no vLLM here")

    monkeypatch.setattr(moe_peers, "loaded", absent)
    said, case = [], moe.experts(reference, ALL, "uniform", 2)
    (record,) = run([case], FakeClock(), MACHINE, said.append, DEVICE, Roof(3.0, 1500.0))
    assert (record.peers_us, record.ours_us) == ({}, 7.0)
    assert said[1:] == [f"peer {name} of moe_layer is absent: no vLLM here" for name in case.peers]


def test_deepgemm_is_absent_where_it_would_convert_scales(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))

    class OnGpu:
        is_cuda, device = True, None

    with pytest.raises(peers.PeerAbsent, match="sm_90 only"):
        moe_peers.experts()["deepgemm"]({"x": OnGpu()})
