"""Batched products of few rows on sm_90: sums rounded once, and torch.bmm's bits."""

import pytest
import torch
from checks import same_bits

from vllm_ue8m0.kernels import replay

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs sm_90",
    ),
]
# H, N, K and columns of x beside a head's: MLA's two products, with TP too, and small ones.
SHAPES = [(128, 512, 128, 64), (128, 128, 512, 0), (16, 512, 128, 64), (3, 64, 256, 8)]


def operands(H, M, N, K, beside, dtype=torch.bfloat16):
    """x [H, M, K] of rows [M, H, K + beside], w [H, K, N] as kept, out [H, M, N] of [M, H, N]."""
    options = {"dtype": dtype, "device": "cuda"}
    x = torch.randn(M, H, K + beside, **options)[..., :K].transpose(0, 1)
    w = torch.randn(H, N, K, **options).transpose(1, 2)
    whole = torch.full((M, H + 1, N), float("nan"), **options)
    return x, w, whole[:, :H].transpose(0, 1), whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("H", "N", "K", "beside"), SHAPES)
@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 16, 17, 32, 33, 64])
def test_sums_are_rounded_once(H, N, K, beside, M, dtype):
    from vllm_ue8m0 import sm90

    x, w, out, whole = operands(H, M, N, K, beside, dtype)
    refusal = sm90.bmm_refusal(x, w, out)
    assert (refusal is not None) == (M * K > 16384)
    sm90.bmm(x, w, out)
    exact = torch.bmm(x.double(), w.double())
    # The sum of float32's roundings, and half a unit of the result.
    bound = K * 2**-24 * torch.bmm(x.double().abs(), w.double().abs())
    bound += exact.abs() * torch.finfo(dtype).eps / 2 * 1.01 + 1e-7
    assert (out.double() - exact).abs().le(bound).all()
    assert whole[:, H].isnan().all()
    if H == 128:
        assert same_bits(out.contiguous(), torch.bmm(x, w))


def test_rows_do_not_depend_on_others():
    from vllm_ue8m0 import sm90

    x, w, out, _ = operands(128, 64, 512, 128, 64)
    sm90.bmm(x, w, out)
    for M in (1, 8, 20):
        few = torch.empty(128, M, 512, dtype=x.dtype, device="cuda")
        sm90.bmm(x[:, -M:], w, few)
        assert same_bits(few, out[:, -M:].contiguous())


def test_others_are_torchs():
    from vllm_ue8m0 import sm90

    x, w, out, _ = operands(4, 5, 64, 128, 64)
    cases = {
        "rows of": (torch.cat([x] * 20, 1), w, out.new_empty(4, 100, 64)),
        "contiguous [H, N, K]": (x, w.contiguous(), out),
        "16 bytes": (operands(4, 5, 64, 128, 3)[0], w, out),
        "dtypes": (x.float(), w.float(), out.float()),
        "of out": (x, w, out.new_empty(4, 64, 5).transpose(1, 2)),
    }
    for reason, (a, b, c) in cases.items():
        assert reason in sm90.bmm_refusal(a, b, c)
        sm90.bmm(a, b, c)
        assert same_bits(c.contiguous(), torch.bmm(a, b))


def test_is_run_again():
    """As it was launched, with other tensors."""
    from vllm_ue8m0 import sm90

    for _ in range(3):
        x, w, out, _ = operands(128, 5, 512, 128, 64)
        replay.run(sm90.bmm, x, w, out)
        assert same_bits(out.contiguous(), torch.bmm(x, w))
    assert any(key[0] is sm90.bmm and run is not None for key, run in replay._kept.items())
