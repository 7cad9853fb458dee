"""vLLM's operators: how they are called, after their schemas in vLLM 0.26, and their absence.

Stand-ins with those schemas compute what vLLM's kernels do, so that a wrong order of arguments,
shape or stride shows here without a GPU.
"""

import builtins

import pytest
import torch

from vllm_ue8m0 import reference
from vllm_ue8m0.bench import peers, quant

SCHEMAS = (
    "per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, "
    "float eps, float fp8_min, float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, "
    "bool dummy_is_tma_aligned) -> ()",
    "per_token_group_fp8_quant_packed(Tensor input, Tensor! output_q, Tensor! output_s_packed, "
    "int group_size, float eps, float fp8_min, float fp8_max) -> ()",
    "silu_and_mul(Tensor! result, Tensor input) -> ()",
    "silu_and_mul_per_block_quant(Tensor! out, Tensor input, Tensor! scales, int group_size, "
    "Tensor? scale_ub=None, bool is_scale_transposed=False) -> ()",
    "persistent_masked_m_silu_mul_quant(Tensor input, Tensor counts, Tensor! y_q, Tensor! y_s, "
    "bool use_ue8m0) -> ()",
    "rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()",
    "fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()",
    "rms_norm_per_block_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, "
    "float epsilon, Tensor? scale_ub, Tensor!? residual, int group_size, "
    "bool is_scale_transposed) -> ()",
)


def quantize(x, q, s, ue8m0):
    codes, scales = reference.act_quant(x, 128, ue8m0)
    q.copy_(codes)
    if ue8m0:
        scales = torch.exp2(scales.to(torch.float32) - 127)
    s.copy_(scales)


def per_token_group_fp8_quant(x, q, s, group, eps, low, high, ue8m0, transposed, aligned):
    assert (group, eps, low, high) == (128, 1e-10, -448, 448)
    M, groups = x.shape[0], x.shape[1] // 128
    assert s.stride() == ((1, -(-M // 4) * 4) if transposed and aligned else (groups, 1))
    quantize(x, q, s, ue8m0)


def pack(scales):
    """[rows, groups] -> [rows, ceil(groups / 4)] int32."""
    groups = scales.shape[-1]
    padded = torch.nn.functional.pad(scales, (0, -groups % 4))
    return padded.contiguous().view(torch.int32)


def per_token_group_fp8_quant_packed(x, q, s, group, eps, low, high):
    assert (group, eps, low, high) == (128, 1e-10, -448, 448)
    assert s.stride() == (1, -(-x.shape[0] // 4) * 4)
    codes, scales = reference.act_quant(x, 128, True)
    q.copy_(codes)
    s.copy_(pack(scales))


def silu_and_mul(out, x):
    out.copy_(reference.silu_mul(x))


def silu_and_mul_per_block_quant(q, x, s, group, scale_ub=None, transposed=False):
    assert (group, scale_ub, transposed) == (128, None, False)
    quantize(reference.silu_mul(x), q, s, False)


def persistent_masked_m_silu_mul_quant(x, counts, q, s, ue8m0):
    T, width = s.shape[1:]
    assert s.stride() == (T * width, 1, T)
    assert counts.dtype == torch.int32
    for e, count in enumerate(counts.tolist()):
        codes, scales = reference.act_quant(reference.silu_mul(x[e, :count]), 128, ue8m0)
        q[e, :count] = codes
        s[e, :count] = pack(scales) if ue8m0 else scales


def norm(x, weight, eps):
    x = x.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (x * weight.to(torch.float32)).to(torch.bfloat16)


def rms_norm(out, x, weight, eps):
    out.copy_(norm(x, weight, eps))


def fused_add_rms_norm(x, residual, weight, eps):
    residual += x
    x.copy_(norm(residual, weight, eps))


def rms_norm_per_block_quant(q, x, weight, s, eps, scale_ub, residual, group, transposed):
    assert (scale_ub, group, transposed) == (None, 128, False)
    if residual is not None:
        residual += x
        x = residual
    quantize(norm(x, weight, eps), q, s, False)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch):
    name = "ue8m0_test_peers"
    library = torch.library.Library(name, "DEF")
    for schema in SCHEMAS:
        op = schema.partition("(")[0]
        library.define(schema)
        library.impl(op, globals()[op], "CPU")
    monkeypatch.setattr(peers, "vllm_op", lambda op: getattr(getattr(torch.ops, name), op))
    yield
    library._destroy()


def all_cases():
    for M in (3, 8):
        for scale, layout in (("ue8m0", "row_major"), ("ue8m0", "mn_major"),
                              ("ue8m0", "mn_major_packed"), ("fp32", "row_major")):  # fmt: skip
            yield quant.act_quant(reference, M, 768, scale, layout)
        for scale in ("ue8m0", "fp32"):
            yield quant.silu_mul_quant(reference, M, 256, scale)
            for residual in (True, False):
                yield quant.rms_norm_quant(reference, M, 256, scale, residual)


def draw(case):
    return case.inputs(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", [*all_cases()], ids=str)
def test_calls_fit_the_schemas_and_do_the_same_work(stand_ins, case):
    assert case.peers or case.context
    for name, operator in {**case.peers, **case.context}.items():
        ours, theirs = case.ours(draw(case)), operator(draw(case))
        assert (case.agree(ours, theirs) is None) == (name != "vllm_fused_fp32")
        assert theirs[1].shape == ours[1].shape


def test_masked_calls(stand_ins):
    case = quant.masked_silu_mul_quant(reference, 4, 8, 768)
    inputs = draw(case)
    for operator in (*case.peers.values(), *case.context.values()):
        q, s = operator(inputs)
        flat = reference.silu_mul_quant(inputs["gate_up"].flatten(0, 1), ue8m0=True)[0]
        ours = [flat.view(torch.uint8).unflatten(0, (4, 8)).view(torch.float8_e4m3fn)]
        assert (case.agree(ours, [q, s]) is None) == (s.dtype == torch.int32)


def names(case):
    return [*case.peers], [*case.context]


def test_who_is_peer_and_who_is_context():
    act, silu, rms = quant.act_quant, quant.silu_mul_quant, quant.rms_norm_quant
    assert names(act(reference, 1, 128)) == (["vllm"], [])
    assert names(act(reference, 1, 128, "fp32")) == (["vllm"], [])
    assert names(act(reference, 1, 128, "ue8m0", "mn_major_packed")) == (["vllm"], [])
    assert names(act(reference, 1, 128, "ue8m0", "mn_major")) == ([], ["vllm_column_major_fp32"])
    for op in (silu, rms):
        assert names(op(reference, 1, 128)) == (["vllm_pair"], ["vllm_fused_fp32"])
        assert names(op(reference, 1, 128, "fp32")) == (["vllm_pair", "vllm_fused"], [])
    masked = quant.masked_silu_mul_quant(reference, 2, 8, 128)
    assert names(masked) == (["vllm_masked"], ["vllm_masked_fp32"])
    assert names(quant.weight_quant(reference, 128, 128, "ue8m0")) == ([], [])


@pytest.fixture
def fresh():
    peers._import_error.cache_clear()
    yield
    peers._import_error.cache_clear()


def test_missing_vllm(fresh, monkeypatch: pytest.MonkeyPatch):
    attempts = []
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("vllm."):
            attempts.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    case = quant.act_quant(reference, 1, 128)
    for _ in range(2):
        with pytest.raises(peers.PeerAbsent, match="vLLM cannot be imported: ModuleNotFoundError"):
            case.peers["vllm"](draw(case))
    assert len(attempts) == 1


def test_missing_operator(fresh, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers, "_import_error", lambda: None)
    with pytest.raises(peers.PeerAbsent, match=r"no operator torch.ops._C.no_such_operator"):
        peers.vllm_op("no_such_operator")
