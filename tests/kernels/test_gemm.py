"""Block-scaled GEMM against float64 products of the dequantized operands."""

import golden
import numpy as np
import pytest
import torch
from checks import (
    BLOCK_SCALING,
    E4M3,
    assert_product,
    backends,
    integers,
    random_codes,
    random_scale,
    same_bits,
)

from vllm_ue8m0 import portable, reference, sm100

BACKENDS = pytest.mark.parametrize("backend", backends(reference, portable, sm100))
KERNELS = pytest.mark.parametrize("module", backends(portable, sm100))
SM100_BYTES = pytest.param(sm100, torch.uint8, marks=BLOCK_SCALING, id="sm100")
U8, F32, BF16 = torch.uint8, torch.float32, torch.bfloat16
GRAN = (128, 128)


def operands(M, N, K, device, a_dtype=U8, w_dtype=U8, gran=GRAN, spread=4):
    groups = -(-K // gran[1])
    a, w = random_codes(M, K, device=device), random_codes(N, K, device=device)
    a_s = random_scale(M, groups, dtype=a_dtype, device=device, spread=spread)
    sf = random_scale(-(-N // gran[0]), groups, dtype=w_dtype, device=device, spread=spread)
    return a, a_s, w, sf


def check(a, a_s, w, sf, gran=GRAN, out_dtype=BF16, c=None, bias=None, module=portable):
    out = module.gemm(a, a_s, w, sf, c, bias, gran, out_dtype)
    assert out.dtype == out_dtype and out.is_contiguous()
    N = w.shape[0]
    scale = 1.0 if c is None else np.repeat(c.double().cpu().numpy(), gran[0])[:N]
    offset = 0.0 if bias is None else bias.double().cpu().numpy()
    a64 = a.double().cpu().numpy() if a_s is None else golden.dequantize(a, a_s, (1, gran[1]))
    assert_product(out, a64, golden.dequantize(w, sf, gran), (scale, offset))
    return out


@KERNELS
@pytest.mark.parametrize("M", [1, 3, 17, 65])
@pytest.mark.parametrize(("N", "K"), [(192, 192), (70, 300), (192, 320)])
def test_odd_shapes(module, device, M, N, K):
    check(*operands(M, N, K, device), module=module)


@pytest.mark.parametrize("M", [3, 33, 129])
def test_576(device, M):
    check(*operands(M, 576, 576, device))


@pytest.mark.parametrize("out_dtype", [BF16, torch.float16, F32])
@pytest.mark.parametrize(("a_dtype", "w_dtype"), [(U8, U8), (U8, F32), (F32, U8), (F32, F32)])
@pytest.mark.parametrize("M", [3, 65])
def test_scale_and_output_dtypes(device, M, a_dtype, w_dtype, out_dtype):
    a, a_s, w, sf = operands(M, 192, 300, device, a_dtype, w_dtype)
    if a_s.dtype == U8:
        a_s -= 12  # keeps the results within float16
    else:
        a_s *= 2.0**-12
    check(a, a_s, w, sf, out_dtype=out_dtype)


@pytest.mark.parametrize(
    "gran", [(64, 128), (16, 64), (32, 32), (128, 64), (1, 128), (7, 32), (96, 128)]
)
@pytest.mark.parametrize(("module", "a_dtype"), [(portable, U8), (portable, F32), SM100_BYTES])
def test_scale_grids(device, gran, module, a_dtype):
    check(*operands(17, 100, 160, device, a_dtype, U8, gran), gran, module=module)


@KERNELS
@pytest.mark.parametrize("with_c", [False, True])
@pytest.mark.parametrize("bias_dtype", [None, BF16, F32])
def test_row_factor_and_bias(module, device, with_c, bias_dtype):
    gran = (64, 128)
    a, a_s, w, sf = operands(17, 150, 192, device, gran=gran)
    c = torch.rand(3, device=device) + 1 if with_c else None
    bias = None
    if bias_dtype is not None:
        bias = (torch.randn(150, device=device) * 1e5).to(bias_dtype)
    check(a, a_s, w, sf, gran, F32, c, bias, module)


@pytest.mark.parametrize("w_dtype", [U8, F32])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
@pytest.mark.parametrize(("M", "N", "K", "gran"), [(3, 70, 300, GRAN), (65, 192, 192, (16, 64))])
def test_activations_not_quantized(device, M, N, K, gran, dtype, w_dtype):
    _, _, w, sf = operands(M, N, K, device, w_dtype=w_dtype, gran=gran, spread=2)
    a = torch.randn(M, K, device=device).to(dtype)
    check(a, None, w, sf, gran, F32)
    wide = torch.randn(M, 2 * K, device=device).to(dtype)
    check(wide[:, K:], None, w, sf, gran, F32)


@pytest.mark.parametrize("M", [3, 65])
@pytest.mark.parametrize("quantized", [True, False])
def test_codes_as_bytes(device, monkeypatch, M, quantized):
    """As before sm_89; tensor cores sum fp16 operands more exactly than e4m3."""
    from vllm_ue8m0.kernels import gemm as kernel

    def as_bytes(codes):
        return codes.view(U8) if codes.dtype == E4M3 else codes

    a, a_s, w, sf = operands(M, 192, 320, device)
    if not quantized:
        a, a_s = torch.randn(M, 320, device=device).to(BF16), None
    monkeypatch.setattr(kernel, "kernel_codes", as_bytes)
    check(a, a_s, w, sf)
    w.view(U8)[5, 7] = 0x7F
    out = portable.gemm(a, a_s, w, sf, None, None, GRAN, BF16)
    assert out[:, 5].isnan().all() and not out[:, :5].isnan().any()


@KERNELS
def test_all_positive(module, device):
    """Hopper's fp8 accumulator truncates: summed over all of K it would shrink this by percents."""
    a, a_s, w, sf = operands(65, 128, 2048, device)
    a, w = a.float().abs().to(E4M3), w.float().abs().to(E4M3)
    check(a, a_s, w, sf, module=module)


@pytest.mark.parametrize(("a_dtype", "w_dtype"), [(U8, U8), (F32, F32)])
def test_scales_spread_over_80_binades(device, a_dtype, w_dtype):
    check(*operands(17, 192, 300, device, a_dtype, w_dtype, spread=40), out_dtype=F32)


@KERNELS
def test_zero_groups_and_extreme_codes(module, device):
    a, a_s, w, sf = operands(17, 192, 320, device)
    a.view(U8)[:, 128:256], w.view(U8)[:, :128] = 0, 0
    a.view(U8)[0, 256:], w.view(U8)[0, 256:] = 0x7E, 0xFE  # 448 and -448
    a.view(U8)[1, 256:], w.view(U8)[1, 256:] = 0x01, 0x01  # the smallest subnormal
    check(a, a_s, w, sf, module=module)


@BACKENDS
@pytest.mark.parametrize(("a_dtype", "w_dtype"), [(U8, U8), (U8, F32), (F32, U8), (F32, F32)])
@pytest.mark.parametrize(
    ("M", "N", "K", "gran"),
    [(1, 70, 300, GRAN), (17, 140, 300, GRAN), (65, 140, 300, GRAN), (65, 40, 100, (16, 32)),
     (600, 140, 192, GRAN), (129, 140, 192, (64, 128)), (33, 70, 192, (5, 64))],
)  # fmt: skip
def test_integers_are_exact(backend, device, M, N, K, gran, a_dtype, w_dtype):
    a, a_s, w, sf = integers(M, N, K, device, gran, a_dtype, w_dtype)
    wanted = golden.dequantize(a, a_s, (1, gran[1])) @ golden.dequantize(w, sf, gran).T
    out = backend.gemm(a, a_s, w, sf, None, None, gran, F32)
    np.testing.assert_array_equal(out.double().cpu().numpy(), wanted)
    # bf16 output is the same sum, rounded once to nearest even.
    rounded = torch.from_numpy(wanted).float().to(BF16)
    assert torch.equal(backend.gemm(a, a_s, w, sf, None, None, gran, BF16).cpu(), rounded)


def pair_products(a_code, w_code, K, sf_bytes, gran_n, device, module=portable):
    """Every byte for a against sf_bytes for w, constant codes: out[i, j gran_n] = K a w 2^e."""
    a = torch.full((256, K), a_code, dtype=U8, device=device).view(E4M3)
    w = torch.full((len(sf_bytes) * gran_n, K), w_code, dtype=U8, device=device).view(E4M3)
    a_s = torch.arange(256, dtype=U8, device=device)[:, None]
    sf = torch.tensor(sf_bytes, dtype=U8, device=device)[:, None]
    out = module.gemm(a, a_s, w, sf, None, None, (gran_n, 32), F32)
    raw = K * golden.E4M3[a_code] * golden.E4M3[w_code]
    exponent = np.arange(256)[:, None] + np.repeat(sf_bytes, gran_n)[None, :] - 254
    with np.errstate(over="ignore"):
        wanted = np.ldexp(np.float64(raw), exponent).astype(np.float32)
    nan = (np.arange(256) == 255)[:, None] | (np.repeat(sf_bytes, gran_n) == 255)[None, :]
    return out.cpu().numpy(), np.where(nan, np.float32("nan"), wanted)


@pytest.mark.parametrize("gran_n", [1, 16])
@pytest.mark.parametrize(("a_code", "w_code"), [(0x38, 0x38), (0x7E, 0x7E), (0x01, 0x01)])
def test_two_bytes_combine_exactly(device, gran_n, a_code, w_code):
    """1 * 1, 448 * 448 and the smallest subnormals, where the combined scale leaves float32."""
    edge = [0, 1, 2, 50, 104, 126, 127, 128, 190, 252, 253, 254, 255]
    sf_bytes = list(range(256)) if gran_n == 1 else edge
    out, wanted = pair_products(a_code, w_code, 32, sf_bytes, gran_n, device)
    normal = (np.abs(wanted) >= np.finfo(np.float32).tiny) | np.isnan(wanted)
    assert normal.sum() > wanted.size // 2
    np.testing.assert_array_equal(out[normal], wanted[normal])
    assert (np.abs(out[~normal]) < np.finfo(np.float32).tiny).all()


EDGES = [*range(5), 10, 50, 104, *range(125, 130), 190, *range(243, 248), 253, 254, 255]


@BLOCK_SCALING
@pytest.mark.parametrize("gran_n", [1, 128])
@pytest.mark.parametrize(("a_code", "w_code"), [(0x38, 0x38), (0x7E, 0x7E), (0x01, 0x01)])
def test_block_scaled_bytes_combine_exactly(device, gran_n, a_code, w_code):
    """As far as the interpreter goes, which scales each operand, in float32, and multiplies then.

    So a factor may be 2^-136 or 2^127 where the product is a number like 1.
    """
    out, wanted = pair_products(a_code, w_code, 32, EDGES, gran_n, device, sm100)
    with np.errstate(over="ignore"):
        a, w = (
            np.ldexp(np.float32(golden.E4M3[code]), np.array(codes) - 127)
            for code, codes in ((a_code, range(256)), (w_code, np.repeat(EDGES, gran_n)))
        )
    held = np.isfinite(a)[:, None] & np.isfinite(w) | np.isnan(wanted)
    held &= (np.abs(wanted) >= np.finfo(np.float32).tiny) | np.isnan(wanted)
    near_one = held & (wanted > 2.0**-30) & (wanted < 2.0**30)
    assert near_one[:5].any() and near_one[243:255].any() and near_one[:, -5 * gran_n :].any()
    np.testing.assert_array_equal(out[held], wanted[held])


@pytest.mark.parametrize("gran_n", [1, 16])
def test_zero_codes_give_zero_under_any_scale(device, gran_n):
    sf_bytes = [0, 1, 127, 253, 254]
    out, _ = pair_products(0x00, 0x7E, 32, sf_bytes, gran_n, device)
    assert (out[:255] == 0).all()
    assert np.isnan(out[255]).all()


@pytest.mark.parametrize(("module", "a_dtype"), [(portable, U8), (portable, F32), SM100_BYTES])
@pytest.mark.parametrize("M", [17, 65])
def test_nan_stays_in_its_row(module, device, M, a_dtype):
    a, a_s, w, sf = operands(M, 192, 300, device, a_dtype)
    clean = module.gemm(a, a_s, w, sf, None, None, GRAN, BF16)
    a.view(U8)[2, 5] = 0x7F
    if a_dtype == U8:
        a_s[0, 1] = 255
    else:
        a_s[0, 1] = torch.nan
    out = module.gemm(a, a_s, w, sf, None, None, GRAN, BF16)
    assert out[[0, 2]].isnan().all()
    keep = [m for m in range(M) if m not in (0, 2)]
    assert torch.equal(out[keep], clean[keep])
    w.view(U8)[7, 299], sf[1, 2] = 0xFF, 255
    out = module.gemm(a, a_s, w, sf, None, None, GRAN, BF16)
    assert out[:, [7, *range(128, 192)]].isnan().all()
    rest = [n for n in range(128) if n != 7]
    assert torch.equal(out[keep][:, rest], clean[keep][:, rest])


def test_batch_invariant_tiles(monkeypatch):
    """On Hopper, tiles of fewer than 64 rows run on instructions that accumulate differently."""
    from vllm_ue8m0.kernels.gemm import tile_config

    assert tile_config(1, E4M3, GRAN)["BLOCK_M"] == 16
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    for dtype in (E4M3, BF16, torch.float16):
        for M in (1, 17, 40, 64, 300, 5000):
            assert tile_config(M, dtype, GRAN)["BLOCK_M"] >= 64
            of_one_warp = [tile_config(rows, dtype, GRAN, one_warp=True) for rows in (1, M)]
            assert len({config["BLOCK_K"] for config in of_one_warp}) == 1  # added up at once
    # Not known of sm_100: there all rows have one tile.
    assert tile_config(1, E4M3, GRAN, True) == tile_config(5000, E4M3, GRAN, True)


def test_deterministic(device):
    args = operands(65, 192, 576, device)
    outs = [portable.gemm(*args, None, None, GRAN, BF16) for _ in range(3)]
    assert same_bits(outs[0], outs[1]) and same_bits(outs[0], outs[2])


def test_strided_operands(device):
    a, a_s, w, sf = operands(17, 192, 320, device)
    wanted = portable.gemm(a, a_s, w, sf, None, None, GRAN, F32)
    wide_a, wide_w = random_codes(17, 640, device=device), random_codes(192, 640, device=device)
    wide_a[:, 64:384], wide_w[:, :320] = a, w
    sf_columns = sf.t().contiguous().t()
    out = portable.gemm(
        wide_a[:, 64:384], a_s.t().contiguous().t(), wide_w[:, :320], sf_columns,
        None, None, list(GRAN), F32,
    )  # fmt: skip
    assert torch.equal(out, wanted)


def test_offsets_beyond_32_bits(device, monkeypatch):
    monkeypatch.undo()  # the memory between the rows is never touched
    row = 2**31 + 64
    a, a_s, w, sf = operands(2, 64, 128, device)
    wanted = portable.gemm(a, a_s, w, sf, None, None, GRAN, F32)
    for name in ("a", "w"):
        far = torch.empty(row + 128, dtype=E4M3, device=device).as_strided((2, 128), (row, 1))
        if name == "a":
            far.copy_(a)
            out = portable.gemm(far, a_s, w, sf, None, None, GRAN, F32)
            assert torch.equal(out, wanted)
        else:
            far.copy_(w[:2])
            out = portable.gemm(a, a_s, far, sf, None, None, GRAN, F32)
            assert torch.equal(out, wanted[:, :2])
        del far


@KERNELS
def test_empty(module, device):
    a, a_s, w, sf = operands(3, 192, 320, device)
    assert module.gemm(a[:0], a_s[:0], w, sf, None, None, GRAN, BF16).shape == (0, 192)
