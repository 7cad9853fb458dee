"""The public operators, with each backend behind them."""

import golden
import numpy as np
import pytest
import torch
from checks import E4M3, assert_product, expert_operands, random_codes, random_scale, same_bits

import vllm_ue8m0
from vllm_ue8m0 import dispatch, ops, portable, reference
from vllm_ue8m0.layouts import grid_shape

U8, F32, BF16 = torch.uint8, torch.float32, torch.bfloat16
GRAN = (128, 128)


@pytest.fixture(params=["reference", "portable"])
def backend(request, monkeypatch):
    """The backend that the public operators dispatch to."""
    monkeypatch.setenv("UE8M0_BACKEND", request.param)
    dispatch.choose.cache_clear()
    yield request.param
    dispatch.choose.cache_clear()


def test_act_quant_leading_shapes_and_formats(backend, device):
    x = torch.randn(2, 3, 300, device=device).bfloat16()
    q, s = vllm_ue8m0.act_quant(x)
    assert q.dtype == E4M3 and q.shape == x.shape
    assert s.dtype == F32 and s.shape == (2, 3, 3)
    q, s = vllm_ue8m0.act_quant(x, 64, "ue8m0")
    assert s.dtype == U8 and s.shape == (2, 3, 5)
    wanted = golden.act_quant_ue8m0(x.view(6, 300), 64)
    np.testing.assert_array_equal(s.view(6, 5).cpu().numpy(), wanted[1])
    np.testing.assert_array_equal(q.view(U8).view(6, 300).cpu().numpy(), wanted[0])
    assert vllm_ue8m0.act_quant(x[0, 0])[1].shape == (3,)
    assert vllm_ue8m0.act_quant(x[:0])[0].shape == (0, 3, 300)


def test_fused_quantizers(backend, device):
    gate_up = torch.randn(2, 3, 600, device=device).bfloat16()
    q, s = vllm_ue8m0.silu_mul_quant(gate_up, scale_fmt="ue8m0")
    assert q.shape == (2, 3, 300) and s.shape == (2, 3, 3) and s.dtype == U8
    alone = vllm_ue8m0.silu_mul_quant(gate_up[1, 2], scale_fmt="ue8m0")
    assert same_bits(alone[0], q[1, 2]) and same_bits(alone[1], s[1, 2])
    counts = torch.tensor([1, 3], device=device)
    masked = vllm_ue8m0.silu_mul_quant(gate_up, scale_fmt="ue8m0", counts=counts)
    assert same_bits(masked[0][1], q[1]) and same_bits(masked[1][0, 0], s[0, 0])

    x, weight = gate_up[0], torch.rand(600, device=device).bfloat16()
    q, s, total, normed = vllm_ue8m0.rms_norm_quant(x, weight, residual=gate_up[1], normed=True)
    assert same_bits(total, x + gate_up[1]) and s.dtype == F32
    wanted = vllm_ue8m0.act_quant(normed)
    assert same_bits(q, wanted[0]) and same_bits(s, wanted[1])

    codes, scales = vllm_ue8m0.weight_quant(x)
    assert codes.shape == x.shape and scales.shape == (1, 5) and scales.dtype == U8
    assert vllm_ue8m0.weight_quant(x, None)[1].dtype == F32


@pytest.mark.parametrize("a_dtype", [U8, torch.float8_e8m0fnu, F32])
@pytest.mark.parametrize("b_dtype", [U8, torch.float8_e8m0fnu, F32])
def test_fp8_gemm_scale_dtypes(backend, device, a_dtype, b_dtype):
    def scale(*shape, dtype):
        s = random_scale(*shape, dtype=F32 if dtype == F32 else U8, device=device)
        return s.view(dtype)

    a, b = random_codes(2, 3, 300, device=device), random_codes(192, 300, device=device)
    a_s, b_s = scale(2, 3, 3, dtype=a_dtype), scale(2, 3, dtype=b_dtype)
    out = vllm_ue8m0.fp8_gemm(a, a_s, b, b_s)
    assert out.shape == (2, 3, 192) and out.dtype == torch.get_default_dtype()
    a64 = golden.dequantize(a.view(6, 300), a_s.view(6, 3), (1, 128))
    assert_product(out.view(6, 192), a64, golden.dequantize(b, b_s, GRAN))


@pytest.mark.parametrize("default", [BF16, torch.float16, F32])
def test_outputs_have_the_default_dtype(backend, device, default):
    b = random_codes(70, 300, device=device)
    b_s = random_scale(1, 3, dtype=U8, device=device) - 4
    a, a_s = vllm_ue8m0.act_quant(torch.randn(3, 300, device=device), scale_fmt="ue8m0")
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        product = vllm_ue8m0.fp8_gemm(a, a_s, b, b_s)
        weight = vllm_ue8m0.weight_dequant(b, b_s.view(torch.float8_e8m0fnu))
    finally:
        torch.set_default_dtype(previous)
    assert product.dtype == weight.dtype == default
    np.testing.assert_array_equal(weight.double().cpu().numpy(), golden.dequantize(b, b_s, GRAN))


def test_fp8_gemm_of_no_rows(backend, device):
    b, b_s = random_codes(70, 128, device=device), torch.ones(1, 1, device=device)
    a, a_s = vllm_ue8m0.act_quant(torch.zeros(0, 128, device=device))
    assert vllm_ue8m0.fp8_gemm(a, a_s, b, b_s).shape == (0, 70)


def test_errors_name_what_is_wrong(device):
    x = torch.randn(3, 300, device=device)
    q, s = vllm_ue8m0.act_quant(x)
    w, w_s = random_codes(192, 300, device=device), torch.ones(2, 3, device=device)
    for call, text in [
        (lambda: vllm_ue8m0.act_quant(x, scale_fmt="e8m0"), "scale_fmt is 'e8m0'; allowed: None"),
        (lambda: vllm_ue8m0.act_quant(x, 48), "block_size is 48; allowed: powers of two"),
        (lambda: vllm_ue8m0.act_quant(x.double()), "x is torch.float64; allowed"),
        (lambda: vllm_ue8m0.act_quant(x, floor=255), "floor is 255; allowed: scale bytes 0 to 254"),
        (
            lambda: vllm_ue8m0.act_quant(x, layout="col"),
            "scale layout is 'col'; allowed: row_major",
        ),
        (lambda: vllm_ue8m0.act_quant(x, layout="mn_major_packed"), "holds UE8M0 bytes"),
        (lambda: vllm_ue8m0.act_quant(x[0], layout="mn_major"), r"needs x \[M, K\]"),
        (lambda: vllm_ue8m0.act_quant(x, counts=x[0]), r"counts must be \[E\] for x \[E, M, K\]"),
        (lambda: vllm_ue8m0.silu_mul_quant(x[:, :5]), r"must be \[\.\.\., 2 I\], got \(3, 5\)"),
        (
            lambda: vllm_ue8m0.rms_norm_quant(x, x[0, :9]),
            r"weight \[K\], got \(3, 300\) and \(9,\)",
        ),
        (lambda: vllm_ue8m0.rms_norm_quant(x, x[0], 1e-6, x.half()), "residual must be .* as x"),
        (lambda: vllm_ue8m0.weight_quant(w), r"w must be \[N, K\] in .*, got .*float8_e4m3fn"),
        (lambda: vllm_ue8m0.weight_quant(x, "mx"), "scale_fmt is 'mx'; allowed: None, 'ue8m0'"),
        (lambda: vllm_ue8m0.weight_dequant(x, w_s), "x must be a 2-D .* weight, got .*float32"),
        (lambda: vllm_ue8m0.weight_dequant(w, w_s.t()), r"s must be \(2, 3\) .* transposed"),
        (lambda: vllm_ue8m0.fp8_gemm(x, s, w, w_s), "a must be .*, got torch.float32"),
        (lambda: vllm_ue8m0.fp8_gemm(q, s, w.view(U8), w_s), "b must be .*, got torch.uint8"),
        (lambda: vllm_ue8m0.fp8_gemm(q, s, w[:, :200], w_s), r"b must be \[N, K\] with a's K"),
        (lambda: vllm_ue8m0.fp8_gemm(q, s[:2], w, w_s), r"a_s must be \(3, 3\) for a \(3, 300\)"),
        (lambda: vllm_ue8m0.fp8_gemm(q, s, w, w_s.t()), r"b_s must be \(2, 3\) for b \(192, 300\)"),
        (lambda: vllm_ue8m0.fp8_gemm(q, s.half(), w, w_s), "a_s is torch.float16; allowed"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()


def test_opcheck(backend, device):
    op = torch.ops.vllm_ue8m0
    x, w = torch.randn(3, 64, device=device).bfloat16(), random_codes(70, 64, device=device)
    both, block = torch.cat([x, x], 1), list(GRAN)
    q, s = ops.act_quant(x, scale_fmt="ue8m0")
    sf, c = random_scale(1, 1, dtype=U8, device=device), torch.rand(1, device=device)
    bias = torch.randn(70, device=device).bfloat16()
    weight, counts = x[0].clone(), torch.tensor([3], device=device)
    places = torch.tensor([[1], [2], [0]], device=device)
    experts = expert_operands(3, 2, device, H=64, inner=32)
    experts[9], experts[10] = list(GRAN), list(GRAN)
    batch = torch.randn(4, 3, 64, device=device).bfloat16()
    used = torch.tensor([3, 0, 1, 2], device=device)
    heads, rotary = torch.randn(3, 4, 20, device=device), torch.randn(3, 8, device=device)
    positions, table = torch.tensor([2, 0, 2], device=device), torch.randn(5, 8, device=device)
    cached = torch.randn(3, 12, device=device), torch.randn(2, 4, 20, device=device), positions * 3
    for name, args in [
        ("act_quant", (x, 128, True)),
        ("act_quant", (x, 64, False)),
        ("act_quant", (x, 32, True, 94, "mn_major_packed")),
        ("act_quant", (x[None], 32, False, 105, "mn_major", counts)),
        ("silu_mul_quant", (x, 32, True, 105, "mn_major")),
        ("silu_mul_quant", (x, 32, True, 105, "row_major", None, places, 3)),
        ("rms_norm_quant", (x, weight, 1e-6, None, 32)),
        ("rms_norm_quant", (x, weight, 1e-6, x, 32, True, 105, "mn_major_packed", True)),
        ("add_rms_norm", (x, weight, 1e-6)),
        ("add_rms_norm", (x, weight, 1e-6, x)),
        ("weight_quant", (x, True)),
        ("weight_dequant", (w, sf, [128, 128], c, BF16)),
        ("gemm", (q, s, w, sf, c, None, [128, 128], BF16)),
        ("linear", (x, w, sf, None, bias, [128, 128], "ue8m0")),
        ("linear", (x, w, sf, None, None, [128, 128], "none")),
        ("norm_linear", (x, weight, 1e-6, x, True, w, sf, c, bias, [128, 128], "ue8m0")),
        ("norm_linear", (x, weight, 1e-6, x, True, w, sf, c, bias, block, "ue8m0", -x, 0.5)),
        ("norm_linear", (x, weight, 1e-6, None, False, w, sf, None, None, [128, 128], "none")),
        ("rotary_embedding", (heads, rotary, positions, table)),
        ("rotary_embedding", (heads, rotary, positions, table, *cached)),
        ("latent_linear", (both, weight, 1e-6, weight[:9], 1.0, w, sf, c, bias, block, "fp32")),
        ("silu_mul_linear", (both, w, sf, c, bias, [128, 128], "ue8m0")),
        ("experts", (torch.zeros_like(x), *experts, "ue8m0", False, places.view(-1).int())),
        (
            "batched_experts",
            (torch.zeros_like(batch), batch, *experts[1:7], used, *experts[9:], "ue8m0"),
        ),
    ]:
        before = [arg.clone() for arg in args if isinstance(arg, torch.Tensor)]
        # test_schema compares arguments by allclose, which torch does not have for e4m3.
        checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if name in ("act_quant", "silu_mul_quant", "rms_norm_quant"):
            checks.append("test_schema")
        torch.library.opcheck(getattr(op, name).default, args, test_utils=checks)
        after = [arg for arg in args if isinstance(arg, torch.Tensor)]
        # Arguments that are written to, which opcheck copies.
        written = (0,) if name.endswith("experts") else ()
        if name == "rotary_embedding":
            written = (0, 1, 5) if len(args) > 4 else (0, 1)
        if written:
            getattr(op, name)(*args)
        for i in reversed(written):
            assert (before.pop(i) != after.pop(i)).any()
        assert all(same_bits(x, y) for x, y in zip(before, after, strict=True))


def layers(device, N=144, K=400):
    """Rows, and the operands of a linear layer behind x."""
    for M, more, gran in ((1, False, (128, 128)), (70, True, (64, 32)), (0, True, (128, 128))):
        w = random_codes(N, K, device=device)
        sf = random_scale(*grid_shape(N, K, gran), dtype=U8, device=device)
        c = torch.rand(len(sf), device=device) if more else None
        bias = torch.randn(N, device=device).bfloat16() if more else None
        yield M, (w, sf, c, bias, list(gran))


@pytest.mark.parametrize("scale", ["ue8m0", "fp32", "none"])
@pytest.mark.parametrize(("residual", "normed"), [(False, False), (True, False), (True, True)])
def test_a_linear_layer_that_takes_its_norm(backend, device, scale, residual, normed):
    """The bits of a norm and a linear layer."""
    op, K = torch.ops.vllm_ue8m0, 400
    weight = torch.rand(K, device=device).bfloat16()
    for M, layer in layers(device, K=K):
        x, added = torch.randn(2, M, 2 * K, device=device).bfloat16()[..., :K]
        norm = weight, 1e-6, added if residual else None
        result, *total = op.add_rms_norm(x, *norm)
        wanted = [op.linear(result, *layer, scale), *total, *([result] if normed else [])]
        found = op.norm_linear(x, *norm, normed, *layer, scale)
        assert len(found) == len(wanted) and all(map(same_bits, found, wanted)), M
        shared = torch.randn(M, K + 8, device=device).bfloat16()[:, :K]
        for dtype in (BF16, torch.float32):
            bias = None if layer[3] is None else layer[3].to(dtype)
            product = *layer[:3], bias, layer[4], scale
            x, shared, residual_ = (t.to(dtype) for t in (x, shared, added))
            summed = x * 2.5 + shared
            norm = weight, 1e-6, residual_ if residual else None
            wanted = op.norm_linear(summed, *norm, normed, *product)
            found = op.norm_linear(x, *norm, normed, *product, shared, 2.5)
            assert len(found) == len(wanted) and all(map(same_bits, found, wanted)), (M, dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("scale", ["ue8m0", "fp32", "none"])
def test_a_linear_layer_that_takes_two_norms(backend, device, scale, dtype):
    """The bits of two norms and a linear layer; what is left of the rows is a copy."""
    op, K = torch.ops.vllm_ue8m0, 400
    for L, R in ((136, 64), (400, 0), (520, 24)):
        weight, side_weight = (torch.rand(size, device=device).to(dtype) for size in (K, L))
        for M, (w, sf, c, bias, gran) in layers(device, K=K):
            layer = w, sf, c, None if bias is None else bias.to(dtype), gran, scale
            x = torch.randn(M, 2 * K + 1000, device=device).to(dtype)[:, : K + L + R]
            wanted = [
                *op.norm_linear(x[:, :K], weight, 1e-6, None, False, *layer),
                *op.add_rms_norm(x[:, K : K + L], side_weight, 1e-3),
                x[:, K + L :],
            ]
            found = op.latent_linear(x, weight, 1e-6, side_weight, 1e-3, *layer)
            assert len(found) == 3 and all(map(same_bits, found, wanted)), (L, M)
            assert all(t.is_contiguous() for t in found)


@pytest.mark.parametrize("scale", ["ue8m0", "fp32", "none"])
def test_a_linear_layer_that_takes_its_activation(backend, device, scale):
    """The bits of the backend's silu(gate) * up, rounded twice, and a linear layer."""
    silu_mul = reference.silu_mul if backend == "reference" else portable.quant.silu_mul
    op, K = torch.ops.vllm_ue8m0, 400
    for M, layer in layers(device, K=K):
        gate_up = torch.randn(M, 3 * K, device=device).bfloat16()[:, : 2 * K]
        wanted = op.linear(silu_mul(gate_up), *layer, scale)
        assert same_bits(op.silu_mul_linear(gate_up, *layer, scale), wanted), M
