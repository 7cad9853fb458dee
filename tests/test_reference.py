"""The reference operators against the format's definition and float64; act_quant: tests/kernels."""

import golden
import numpy as np
import pytest
import torch
from checks import assert_product, calc_diff, expert_operands, random_codes, random_scale, same_bits

from vllm_ue8m0 import reference

U8, F32, BF16 = torch.uint8, torch.float32, torch.bfloat16
GRAN = (128, 128)


@pytest.mark.parametrize("count", [1, 20])  # 20 * 256 codes take the CPU's fast path
def test_e4m3_to_float_every_code(device, count):
    codes = torch.arange(256, dtype=U8, device=device).repeat(count).view(torch.float8_e4m3fn)
    values = reference.e4m3_to_float(codes).double().cpu().numpy()
    np.testing.assert_array_equal(values, np.tile(golden.E4M3, count))
    assert np.signbit(values[128:255]).all()  # 0x80 is -0.0
    finite = codes[codes.view(U8) & 0x7F != 0x7F]
    assert reference.e4m3_to_float(finite).isfinite().all()


def test_fake_quant(device):
    x = torch.randn(5, 300, device=device).bfloat16()
    assert torch.equal(reference.fake_quant(x, 128, "none"), x.float())
    for name, quant in [("ue8m0", golden.act_quant_ue8m0), ("fp32", golden.act_quant_float)]:
        codes, scale = quant(x, 128)
        values = golden.dequantize(torch.from_numpy(codes), torch.from_numpy(scale), (1, 128))
        out = reference.fake_quant(x, 128, name)
        np.testing.assert_array_equal(out.cpu().numpy(), values.astype(np.float32))


@pytest.mark.parametrize("w_dtype", [U8, F32])
@pytest.mark.parametrize("a_dtype", [U8, F32])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 70, 300), (17, 192, 320), (3, 576, 576)])
def test_gemm(device, M, N, K, a_dtype, w_dtype):
    gran = (64, 128)
    a, w = random_codes(M, K, device=device), random_codes(N, K, device=device)
    a_s = random_scale(M, -(-K // 128), dtype=a_dtype, device=device)
    sf = random_scale(-(-N // 64), -(-K // 128), dtype=w_dtype, device=device)
    c = torch.rand(sf.shape[0], device=device) + 1
    bias = torch.randn(N, device=device).bfloat16()
    out = reference.gemm(a, a_s, w, sf, c, bias, gran, BF16)
    scale = np.repeat(c.double().cpu().numpy(), 64)[:N]
    offset = bias.double().cpu().numpy()
    a64, w64 = golden.dequantize(a, a_s, (1, 128)), golden.dequantize(w, sf, gran)
    assert_product(out, a64, w64, (scale, offset))


def test_gemm_a_few_rows_at_a_time(device, monkeypatch):
    a, w = random_codes(3, 192, device=device), random_codes(300, 192, device=device)
    a_s = torch.full((3, 2), 127, dtype=U8, device=device)
    sf = random_scale(5, 2, dtype=U8, device=device)
    whole = reference.gemm(a, a_s, w, sf, None, None, (64, 128), F32)
    monkeypatch.setattr(reference.products, "_CHUNK_ELEMENTS", 192 * 100)
    chunked = reference.gemm(a, a_s, w, sf, None, None, (64, 128), F32)
    torch.testing.assert_close(chunked, whole)


def test_silu_mul_rounds_twice(device):
    gate_up = torch.randn(9, 600, device=device).bfloat16() * 3
    gate, up = gate_up.double().cpu().chunk(2, -1)
    silu = (gate / (1 + torch.exp(-gate))).float().bfloat16()
    wanted = silu * up.to(BF16)
    out = reference.silu_mul(gate_up)
    assert out.dtype == BF16
    assert (out.cpu() != wanted).float().mean() < 1e-3  # float64 rounded twice on the way


@pytest.mark.parametrize("activation_scale", ["ue8m0", "fp32", "none"])
@pytest.mark.parametrize("topk", [1, 3])
def test_experts_is_a_loop_over_tokens(device, activation_scale, topk):
    args = expert_operands(7, topk, device)
    x, w13, sf13, _, w2, sf2, _, weights, ids, gran, _ = args
    ids[2], ids[4, -1] = -1, -1
    weight_on_input = topk == 1
    out = reference.experts(*args, activation_scale, weight_on_input)
    for m in range(7):
        total = torch.zeros(x.shape[1], device=device)
        for k, e in enumerate(ids[m].tolist()):
            if e < 0:
                continue
            row = x[m : m + 1]
            if weight_on_input:
                row = row * weights[m, k].to(BF16)
            hidden = reference.silu_mul(
                reference.linear(row, w13[e], sf13[e], None, None, gran, activation_scale)
            )
            kept = reference.fake_quant(hidden, 128, activation_scale)
            product = reference.matmul(kept, w2[e], sf2[e], gran)[0]
            total += (product if weight_on_input else product * weights[m, k]).to(BF16).float()
        wanted = total.to(BF16).double().cpu().numpy()
        got = out[m].double().cpu().numpy()
        # One row or several at a time: the sums of the products may differ in their last bits.
        assert ((wanted == 0).all() and (got == 0).all()) or calc_diff(got, wanted) < 5e-5


def test_weight_quant_bytes_are_the_smallest(device):
    w = torch.randn(200, 300, device=device) * torch.logspace(-6, 3, 300, device=device)
    w[:128, :128], w[130, 5], w[:128, 128:256] = 0, 448.0, w[:128, 128:256].clamp(-0.4375, 0.4375)
    w[3, 200] = 0.4375  # 448 * 2^-10
    q, sf = reference.weight_quant(w)
    assert sf.dtype == U8 and sf.shape == (2, 3) and q.shape == w.shape and q.is_contiguous()
    for i in range(2):
        for j in range(3):
            rows, columns = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            block = w[rows, columns].double().cpu().numpy()
            if np.abs(block).max() == 0:
                assert (q[rows, columns].view(U8) == 0).all() and sf[i, j] != 255
                continue
            byte = golden.quant_byte(float(np.abs(block).max()), 0)
            assert sf[i, j] == byte
            codes = golden.e4m3_encode(block / golden.UE8M0[byte])
            np.testing.assert_array_equal(q[rows, columns].view(U8).cpu().numpy(), codes)
    assert (sf[0, 1], sf[1, 0]) == (117, 127)


def test_weight_quant_float_scales(device):
    w = torch.randn(200, 130, device=device)
    q, scale = reference.weight_quant(w, ue8m0=False)
    assert scale.dtype == F32
    amax = w[128:, 128:].abs().max().cpu().numpy()
    assert scale[1, 1].cpu().numpy() == amax / np.float32(448)
    values = reference.dequantize(q, scale, GRAN)
    blocks = reference.dequantize(torch.full_like(q, 16.0), scale, GRAN)  # half of the top spacing
    assert ((values - w).abs() <= blocks).all()


@pytest.mark.parametrize("odd", [golden.NAN, golden.INF])
def test_weight_quant_refuses_nan_and_inf(device, odd):
    w = torch.randn(130, 10, device=device)
    w[129, 3] = odd
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        reference.weight_quant(w)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_weight_dequant_undoes_weight_quant_of_its_own_values(device, dtype):
    w = torch.randn(130, 140, device=device)
    q, sf = reference.weight_quant(w)
    values = reference.weight_dequant(q, sf, out_dtype=dtype)
    again_q, again_sf = reference.weight_quant(values.float())
    assert same_bits(again_q, q) and same_bits(again_sf, sf)
