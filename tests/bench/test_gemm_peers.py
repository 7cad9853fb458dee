"""Products of other libraries: how they are called, after vLLM 0.26, and their absence.

Stand-ins compute the product and check what vLLM's kernels take, so that a wrong operand, stride or
argument shows here without a GPU.
"""

import pytest
import torch
from fake_clock import DEVICE, MACHINE, FakeClock

from vllm_ue8m0 import reference
from vllm_ue8m0.bench import gemm, gemm_peers, peers
from vllm_ue8m0.bench.roof import Roof
from vllm_ue8m0.bench.run import run

GRAN = (128, 128)


def multiply(a, a_s, w, w_s):
    assert a_s.dtype == w_s.dtype == torch.float32
    assert a_s.shape == (a.shape[0], a.shape[1] // 128)
    return reference.gemm(a, a_s, w, w_s, None, None, GRAN, torch.bfloat16)


def deepgemm(ue8m0):
    def fp8_gemm_nt(lhs, rhs, out, is_deep_gemm_e8m0_used):
        (a, a_s), (w, w_s) = lhs, rhs
        assert is_deep_gemm_e8m0_used == ue8m0 and w_s.is_contiguous()
        assert a_s.stride() == (1, -(-a.shape[0] // 4) * 4)
        out.copy_(multiply(a, a_s, w, w_s))

    return fp8_gemm_nt


def cutlass_scaled_mm(out, a, b, a_s, b_s, bias):
    assert bias is None and b.stride(0) == 1 and b_s.stride(0) == 1  # column-major, as vLLM's `.T`
    assert a_s.stride() == (1, a.shape[0])
    out.copy_(multiply(a, a_s, b.t(), b_s.t()))


def w8a8_triton_block_scaled_mm(a, w, a_s, w_s, block_size, output_dtype):
    assert (block_size, output_dtype) == ([128, 128], torch.bfloat16)
    assert a_s.is_contiguous()
    return multiply(a, a_s, w, w_s)


def fp8_blockscale_gemm_sm90(input, weight, weight_scale, out_dtype):
    assert (input.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16)
    a, a_s = reference.act_quant(input)  # float32 scales
    return multiply(a, a_s, weight, weight_scale)


def per_token_group_fp8_quant(x, q, s, group, eps, low, high, ue8m0, column_major, tma):
    assert (group, eps, low, high) == (128, 1e-10, -448, 448)
    M = x.shape[0]
    columns = -(-M // 4) * 4 if tma else M
    assert s.stride() == ((1, columns) if column_major else (x.shape[1] // 128, 1))
    codes, scales = reference.act_quant(x, 128, ue8m0)
    q.copy_(codes)
    s.copy_(torch.exp2(scales.to(torch.float32) - 127) if ue8m0 else scales)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch):
    """Sets the peers up for scales of one kind."""

    def set_up(ue8m0):
        kernels = {
            gemm_peers._load_deepgemm: deepgemm(ue8m0),
            gemm_peers._load_triton: w8a8_triton_block_scaled_mm,
            gemm_peers._load_flashinfer: fp8_blockscale_gemm_sm90,
        }
        monkeypatch.setattr(gemm_peers, "loaded", kernels.get)
        for module in (peers, gemm_peers):
            monkeypatch.setattr(module, "vllm_op", lambda name: globals()[name])

    return set_up


def draw(case):
    return case.inputs(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", ["ue8m0", "fp32"])
@pytest.mark.parametrize("M", [1, 3, 8])
def test_calls_do_the_same_work(stand_ins, M: int, scale: str):
    stand_ins(scale == "ue8m0")
    product = gemm.gemm(reference, "decode_gemm", M, 384, 256, scale)
    linear = gemm.linear(reference, M, 384, 256, scale)
    assert [*product.peers] == ["deepgemm", "cutlass", "triton"]
    assert [*linear.peers] == [
        "vllm_quant_deepgemm", "flashinfer", "vllm_quant_cutlass", "vllm_quant_triton"
    ]  # fmt: skip
    for case in (product, linear):
        inputs = draw(case)
        ours = case.ours(inputs)
        for name, operator in case.peers.items():
            theirs = operator(inputs)
            assert case.agree_with.get(name, case.agree)(ours, theirs) is None, name
            # FlashInfer rounds activations with other scales than powers of two.
            assert (case.agree(ours, theirs) is None) == (name != "flashinfer" or scale == "fp32")


def test_a_peer_that_rounds_otherwise_must_still_multiply_the_same():
    case = gemm.linear(reference, 4, 384, 256)
    ours = case.ours(draw(case))
    agree = case.agree_with["flashinfer"]
    assert "4 of 4 rows differ" in agree(ours, [ours[0].roll(1, 0)])
    assert "4 of 4 rows differ" in agree(ours, [ours[0] * 1.25])


def test_cublas_is_other_work(monkeypatch: pytest.MonkeyPatch):
    fast = []

    def scaled_mm(a, w, *, scale_a, scale_b, out_dtype, use_fast_accum):
        fast.append(use_fast_accum)
        assert scale_a.item() == scale_b.item() == 1 and scale_a.dtype == torch.float32
        return (a.float() @ w.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    case = gemm.gemm(reference, "prefill_gemm", 4, 128, 256)
    for operator in case.context.values():
        (out,) = operator(draw(case))
        assert out.shape == (4, 128) and out.isfinite().all()
    assert [*case.context] == ["cublas_per_tensor_fast", "cublas_per_tensor"]
    assert fast == [True, False]


def test_absent_peers_are_said_with_their_reasons(monkeypatch: pytest.MonkeyPatch):
    def absent(what):
        raise peers.PeerAbsent("no vLLM here")

    monkeypatch.setattr(gemm_peers, "loaded", absent)
    for module in (peers, gemm_peers):
        monkeypatch.setattr(module, "vllm_op", absent)
    cases = [gemm.gemm(reference, "middle_gemm", 4, 128, 256), gemm.linear(reference, 4, 128, 256)]
    said = []
    for record in run(cases, FakeClock(), MACHINE, said.append, DEVICE, Roof(3.0, 1500.0)):
        assert (record.peers_us, record.ours_us) == ({}, 7.0)
    for case in cases:
        for name in case.peers:
            assert f"peer {name} of {case.bench} is absent: no vLLM here" in said


def test_absence_is_found_once(monkeypatch: pytest.MonkeyPatch):
    attempts = []

    def load():
        attempts.append(1)
        raise ModuleNotFoundError("No module named 'vllm'")

    peers._try.cache_clear()
    for _ in range(2):
        with pytest.raises(peers.PeerAbsent, match="cannot be imported: ModuleNotFoundError: No"):
            peers.loaded(load)
    assert len(attempts) == 1


def test_deepgemm_is_absent_where_it_would_convert_scales(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))

    class OnGpu:
        is_cuda, device = True, None

    with pytest.raises(peers.PeerAbsent, match="sm_90 only"):
        gemm_peers._deepgemm(OnGpu(), None, None, None, True)
