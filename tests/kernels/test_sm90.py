"""The sm_90 products: float64, integers, each other's bits, every edge. Needs an H100 or H200."""

import golden
import numpy as np
import pytest
import torch
from checks import E4M3, assert_product, random_codes, random_scale, same_bits

from vllm_ue8m0 import portable
from vllm_ue8m0.layouts import to_layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="Gluon kernels for sm_90",
    ),
]
U8, F32, BF16 = torch.uint8, torch.float32, torch.bfloat16
GRAN = (128, 128)
# Last blocks of K that are whole or not, odd and even numbers of them, N in and out of tiles.
SHAPES = [(192, 192), (70, 304), (129, 1040), (576, 640), (2112, 1408)]
DECODE = [  # block_n, stages, splits, programs, warps
    (64, 1, 1, 132, 4), (64, 3, 1, 7, 4), (128, 2, 1, 132, 8), (64, 2, 1, 12, 8), (64, 2, 2, 12, 4),
    (64, 4, 4, 264, 8), (128, 2, 3, 30, 8),
]  # fmt: skip
PREFILL = [  # block_m, block_n, stages, splits
    (256, 128, 4, 1), (256, 128, 3, 1), (128, 128, 6, 1), (256, 64, 5, 1), (128, 64, 8, 1),
    (128, 32, 10, 1), (128, 128, 4, 2), (128, 64, 8, 3), (128, 32, 10, 4),
]  # fmt: skip


@pytest.fixture
def sm90():
    from vllm_ue8m0 import sm90

    return sm90


def operands(M, N, K, a_dtype=U8, w_dtype=U8, spread=4):
    groups = -(-K // 128)
    a, w = random_codes(M, K, device="cuda"), random_codes(N, K, device="cuda")
    a_s = random_scale(M, groups, dtype=a_dtype, device="cuda", spread=spread)
    sf = random_scale(-(-N // 128), groups, dtype=w_dtype, device="cuda", spread=spread)
    return a, a_s, w, sf


def integers(M, N, K):
    """Small integers and scales 2^k: every partial sum is exact in any order."""
    a = torch.randint(-2, 3, (M, K), device="cuda").float().to(E4M3)
    w = torch.randint(-2, 3, (N, K), device="cuda").float().to(E4M3)
    groups = -(-K // 128)
    a_s = torch.randint(125, 130, (M, groups), device="cuda").to(U8)
    return a, a_s, w, torch.randint(125, 130, (-(-N // 128), groups), device="cuda").to(U8)


def decode(a, a_s, w, sf, config, out_dtype=F32, c=None, bias=None, ue8m0=True):
    from vllm_ue8m0.kernels import decode_gemm
    from vllm_ue8m0.kernels.hopper_config import DecodeConfig, tokens
    from vllm_ue8m0.sm90.counters import counters

    M, N = a.shape[0], w.shape[0]
    block_n, stages, splits, programs, warps = config
    warps = warps if M > 8 else block_n // 16  # a warpgroup needs 8 tokens
    fused = a_s is None
    config = DecodeConfig(tokens(M), block_n, stages, splits, programs, fused, warps)
    out = torch.empty(M, N, dtype=out_dtype, device="cuda")
    decode_gemm.launch(a, a_s, w, sf, c, bias, out, config, counters(w, N), ue8m0, 105)
    return out


def prefill(a, a_s, w, sf, config, out_dtype=F32, c=None, bias=None):
    from vllm_ue8m0.kernels import prefill_gemm
    from vllm_ue8m0.kernels.hopper_config import PrefillConfig
    from vllm_ue8m0.sm90.counters import counters

    M, N = a.shape[0], w.shape[0]
    out, a_s = torch.empty(M, N, dtype=out_dtype, device="cuda"), to_layout(a_s, "mn_major")
    count = counters(w, M * N)
    prefill_gemm.launch(a, a_s, w, sf, c, bias, out, PrefillConfig(*config), count, 132)
    return out


def kernels(M):
    if M <= 64:
        return [(decode, config) for config in DECODE]
    return [(prefill, config) for config in PREFILL]


@pytest.mark.parametrize("M", [1, 3, 8, 9, 17, 64, 65, 200, 300])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_every_configuration(M, N, K):
    """Exact on integers; against float64; without splits all of them the same bits."""
    exact, random = integers(M, N, K), operands(M, N, K)
    wanted = golden.dequantize(*exact[:2], (1, 128)) @ golden.dequantize(*exact[2:], GRAN).T
    a64, w64 = golden.dequantize(*random[:2], (1, 128)), golden.dequantize(*random[2:], GRAN)
    outs = []
    for kernel, config in kernels(M):
        for _ in range(2):  # the second finds the counters that the first left
            out = kernel(*exact, config)
            np.testing.assert_array_equal(out.double().cpu().numpy(), wanted, str(config))
        rounded = kernel(*exact, config, out_dtype=BF16)
        assert torch.equal(rounded.cpu(), torch.from_numpy(wanted).float().to(BF16)), config
        out = kernel(*random, config)
        assert_product(out, a64, w64)
        splits = config[2] if M <= 64 else config[3]
        if splits == 1:
            outs.append(out)
        else:
            assert all(same_bits(out, kernel(*random, config)) for _ in range(5)), config
    assert all(same_bits(outs[0], out) for out in outs[1:])


@pytest.mark.parametrize("K", [192, 1040])
def test_few_rows_and_many_have_the_same_bits(sm90, K, monkeypatch):
    """As has portable's kernel where it runs on the same instructions, from 64 rows on."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    a, a_s, w, sf = operands(700, 576, K)
    whole = sm90.gemm(a, a_s, w, sf, None, None, GRAN, F32)
    assert same_bits(whole, portable.gemm(a, a_s, w, sf, None, None, GRAN, F32))
    for M in (1, 2, 8, 13, 33, 64, 65, 130, 256, 400):
        out = sm90.gemm(a[:M], a_s[:M], w, sf, None, None, GRAN, F32)
        assert same_bits(out, whole[:M]), M
        last = sm90.gemm(a[-M:], a_s[-M:], w, sf, None, None, GRAN, F32)
        assert same_bits(last, whole[-M:]), M


@pytest.mark.parametrize(("N", "K"), [(512, 7168), (2112, 7168), (3072, 1536)])
def test_a_row_does_not_depend_on_the_batch_of_its_regime(sm90, N, K):
    x = torch.randn(64, K, device="cuda", dtype=BF16)
    _, _, w, sf = operands(1, N, K)
    whole = sm90.linear(x, w, sf, None, None, GRAN, "ue8m0")
    for M in (1, 2, 7, 8, 16, 31, 33, 63):
        assert same_bits(sm90.linear(x[:M], w, sf, None, None, GRAN, "ue8m0"), whole[:M]), M
        x_nan = x[: M + 1].clone()
        x_nan[M] = torch.nan
        out = sm90.linear(x_nan, w, sf, None, None, GRAN, "ue8m0")
        assert same_bits(out[:M], whole[:M]) and out[M].isnan().all()


@pytest.mark.parametrize("kind", ["ue8m0", "fp32"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, F32])
@pytest.mark.parametrize("M", [1, 5, 8, 16, 31, 64, 100])
def test_linear_is_quantization_and_product(sm90, M, dtype, kind):
    """Inside the kernel too: fused and not, every configuration gives the same bits."""
    N, K = 192, 1040
    x = (torch.randn(M, K, device="cuda") * torch.rand(M, 1, device="cuda") * 50).to(dtype)
    x[0, :128] = 0
    x[0, 130] = 448 * 2.0**-3
    _, _, w, sf = operands(1, N, K)
    sf -= 12
    a, a_s = portable.act_quant(x, 128, kind == "ue8m0")
    bias = torch.randn(N, device="cuda", dtype=dtype)
    wanted = sm90.gemm(a, a_s, w, sf, None, bias, GRAN, dtype)
    assert same_bits(sm90.linear(x, w, sf, None, bias, GRAN, kind), wanted)
    if M <= 64:
        for config in ((64, 2, 1, 132, 4), (128, 1, 1, 1, 8), (64, 2, 3, 9, 8)):
            unfused = decode(a, a_s, w, sf, config, dtype, bias=bias)
            fused = decode(x, None, w, sf, config, dtype, bias=bias, ue8m0=kind == "ue8m0")
            assert same_bits(fused, unfused), config


@pytest.mark.parametrize("M", [1, 8, 9, 33, 64, 65, 300])
@pytest.mark.parametrize("kind", ["ue8m0", "fp32", "none"])
def test_a_linear_layer_that_takes_its_norm(sm90, M, kind):
    """The bits of a norm and a linear layer, whether the norm or the product quantizes."""
    for (N, K), added in (((192, 1040), True), ((2112, 7168), False)):
        _, _, w, sf = operands(1, N, K)
        x, residual = torch.randn(2, M, 2 * K, device="cuda", dtype=BF16)[..., :K]
        norm = torch.rand(K, device="cuda", dtype=BF16), 1e-6, residual if added else None
        product = (w, sf, None, None, GRAN, kind)
        normed, *total = portable.add_rms_norm(x, *norm)
        wanted = [sm90.linear(normed, *product), *total, normed]
        found = sm90.norm_linear(x, *norm, True, *product)
        assert len(found) == len(wanted) and all(map(same_bits, found, wanted))
        assert len(sm90.norm_linear(x, *norm, False, *product)) == len(wanted) - 1
        shared = torch.randn(M, K, device="cuda", dtype=BF16)
        wanted = sm90.norm_linear(x * 2.5 + shared, *norm, True, *product)
        found = sm90.norm_linear(x, *norm, True, *product, shared, 2.5)
        assert len(found) == len(wanted) and all(map(same_bits, found, wanted))


@pytest.mark.parametrize("M", [0, 1, 8, 33, 300])
@pytest.mark.parametrize("kind", ["ue8m0", "fp32", "none"])
@pytest.mark.parametrize(
    ("N", "K", "L", "R", "dtype"),
    [
        (24576, 1536, 512, 64, BF16),
        (256, 1536, 1536, 0, torch.float16),
        (192, 1040, 200, 63, BF16),
        (256, 7168, 2048, 8, BF16),
        (256, 16384, 1000, 64, BF16),
        (256, 16384, 4000, 64, BF16),
        (256, 1536, 512, 64, F32),
        (256, 512, 1024, 64, BF16),
    ],
)
def test_a_linear_layer_that_takes_two_norms(sm90, M, N, K, L, R, dtype, kind):
    """The bits of each alone: the two sums of one kernel are in the order of a kernel for each."""
    _, _, w, sf = operands(1, N, K)
    x = torch.randn(M, K + L + R, device="cuda").to(dtype) * 3
    weight, side_weight = (torch.rand(size, device="cuda").to(dtype) for size in (K, L))
    product = (w, sf, None, None, GRAN, kind)
    found = sm90.latent_linear(x, weight, 1e-6, side_weight, 1e-5, *product)
    wanted = [
        *sm90.norm_linear(x[:, :K], weight, 1e-6, None, False, *product),
        *portable.add_rms_norm(x[:, K : K + L], side_weight, 1e-5),
        x[:, K + L :],
    ]
    assert len(found) == 3 and all(map(same_bits, found, wanted))


@pytest.mark.parametrize("M", [1, 9, 64, 300])
@pytest.mark.parametrize("kind", ["ue8m0", "fp32", "none"])
def test_a_linear_layer_that_takes_its_activation(sm90, M, kind):
    for N, K in ((192, 1040), (7168, 2048)):
        _, _, w, sf = operands(1, N, K)
        gate_up = torch.randn(M, 2 * K, device="cuda", dtype=BF16)
        product = (w, sf, None, None, GRAN, kind)
        wanted = sm90.linear(portable.quant.silu_mul(gate_up), *product)
        assert same_bits(sm90.silu_mul_linear(gate_up, *product), wanted)


def test_fused_quantization_of_special_values():
    """Every bf16 amax, Inf and NaN: the codes and scales of act_quant."""
    patterns = torch.arange(2**16, device="cuda").to(torch.int32).to(torch.int16).view(BF16)
    _, _, w, sf = operands(1, 64, 256)
    one = torch.eye(64, 256, device="cuda")
    w.copy_((one + one.roll(128, 1)).to(E4M3))
    sf[:] = 127
    for part in patterns.view(-1, 32).split(64)[::8]:
        x = torch.zeros(len(part), 256, device="cuda", dtype=BF16)
        x[:, :32] = part
        a, a_s = portable.act_quant(x, 128, True)
        wanted = decode(a, a_s, w, sf, (64, 1, 1, 132, 4))
        assert same_bits(decode(x, None, w, sf, (64, 1, 1, 132, 4)), wanted)


@pytest.mark.parametrize("out_dtype", [BF16, torch.float16, F32])
@pytest.mark.parametrize(("a_dtype", "w_dtype"), [(U8, U8), (U8, F32), (F32, U8), (F32, F32)])
@pytest.mark.parametrize("M", [3, 40, 300])
def test_scale_and_output_dtypes(M, a_dtype, w_dtype, out_dtype):
    a, a_s, w, sf = operands(M, 200, 1040, a_dtype, w_dtype)
    if a_s.dtype == U8:
        a_s -= 15  # keeps the results within float16
    else:
        a_s *= 2.0**-15
    c = torch.rand(2, device="cuda") + 1
    bias = (torch.randn(200, device="cuda") * 100).to(out_dtype)
    a64, w64 = golden.dequantize(a, a_s, (1, 128)), golden.dequantize(w, sf, GRAN)
    scale, offset = np.repeat(c.double().cpu().numpy(), 128)[:200], bias.double().cpu().numpy()
    for kernel, config in kernels(M):
        out = kernel(a, a_s, w, sf, config, out_dtype, c, bias)
        assert_product(out, a64, w64, (scale, offset))


@pytest.mark.parametrize("M", [1, 7, 33, 64, 130])
@pytest.mark.parametrize("dtype", [U8, F32])
def test_layouts_of_activation_scales(sm90, M, dtype):
    a, a_s, w, sf = operands(M, 192, 1040, dtype)
    wanted = sm90.gemm(a, a_s, w, sf, None, None, GRAN, F32)
    wide = torch.zeros(M, 40, dtype=dtype, device="cuda")
    wide[:, 3 : 3 + a_s.shape[1]] = a_s
    for scale in (
        to_layout(a_s, "mn_major"), a_s.t().contiguous().t(), wide[:, 3 : 3 + a_s.shape[1]],
    ):  # fmt: skip
        assert same_bits(sm90.gemm(a, scale, w, sf, None, None, GRAN, F32), wanted)


@pytest.mark.parametrize("M", [17, 200])
def test_nan_stays_in_its_row(M):
    a, a_s, w, sf = operands(M, 192, 1040)
    for kernel, config in kernels(M):
        clean = kernel(a, a_s, w, sf, config)
        dirty, scales = a.clone(), a_s.clone()
        dirty.view(U8)[2, 5] = 0x7F
        scales[0, 1] = 255
        out = kernel(dirty, scales, w, sf, config)
        keep = [m for m in range(M) if m not in (0, 2)]
        assert out[[0, 2]].isnan().all() and same_bits(out[keep], clean[keep]), config
        bad = sf.clone()
        bad[1, 3] = 255
        out = kernel(a, a_s, w, bad, config)
        assert out[:, 128:].isnan().all() and same_bits(out[:, :128], clean[:, :128])


@pytest.mark.parametrize("M", [17, 200])
def test_hard_values(M):
    """All positive (an accumulator that truncates would shrink it), zeros, 80 binades of scales."""
    for spread, positive in ((4, True), (40, False)):
        a, a_s, w, sf = operands(M, 192, 2048, spread=spread)
        if positive:
            a, w = a.float().abs().to(E4M3), w.float().abs().to(E4M3)
        else:
            a.view(U8)[:, 128:256], w.view(U8)[:, :128] = 0, 0
        a64, w64 = golden.dequantize(a, a_s, (1, 128)), golden.dequantize(w, sf, GRAN)
        for kernel, config in kernels(M):
            assert_product(kernel(a, a_s, w, sf, config), a64, w64)


@pytest.mark.parametrize("M", [64, 256])
def test_range_of_two_bytes(M):
    """Exact from 2^-149 to 2^127; below, less than 2^-124 is lost; above, nothing looks finite."""
    a = torch.full((M, 128), 0x38, dtype=U8, device="cuda").view(E4M3)  # 1
    w = torch.full((256 * 128, 128), 0x38, dtype=U8, device="cuda").view(E4M3)
    sf = torch.arange(256, dtype=U8, device="cuda")[:, None]
    for first in range(0, 256, M):
        a_s = torch.arange(first, first + M, dtype=U8, device="cuda")[:, None]
        kernel, config = kernels(M)[0]
        out = kernel(a, a_s, w, sf, config)[:, ::128].double().cpu().numpy()
        exponent = np.arange(first, first + M)[:, None] + np.arange(256)[None, :] - 254
        nan = (np.arange(first, first + M) == 255)[:, None] | (np.arange(256) == 255)[None, :]
        exact = (exponent >= -149) & (exponent <= 120) & ~nan
        np.testing.assert_array_equal(out[exact], 128 * np.exp2(exponent[exact].astype(float)))
        assert (np.abs(out[(exponent < -149) & ~nan]) < 2.0**-124).all()
        assert not np.isfinite(out[(exponent > 120) & ~nan]).any() and np.isnan(out[nan]).all()


@pytest.mark.parametrize(("N", "K"), [(512, 7168), (2112, 1024)])
def test_middle_and_large_regimes_do_not_depend_on_the_batch(sm90, N, K):
    a, a_s, w, sf = operands(600, N, K, spread=40)
    for whole, rows in ((256, (65, 100, 129, 200)), (600, (257, 300, 400))):
        wanted = sm90.gemm(a[:whole], a_s[:whole], w, sf, None, None, GRAN, F32)
        for M in rows:
            assert same_bits(sm90.gemm(a[:M], a_s[:M], w, sf, None, None, GRAN, F32), wanted[:M])


def test_graphs_replay_with_splits(sm90):
    _, _, w, sf = operands(1, 512, 7168)
    x = torch.randn(16, 7168, device="cuda", dtype=BF16)
    for warm in (False, True):
        if warm:
            sm90.linear(x, w, sf, None, None, GRAN, "ue8m0")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [sm90.linear(x, w, sf, None, None, GRAN, "ue8m0") for _ in range(3)]
        for _ in range(3):
            x.normal_()
            wanted = sm90.linear(x, w, sf, None, None, GRAN, "ue8m0").clone()
            graph.replay()
            assert all(same_bits(out, wanted) for out in outs)


def test_weights_are_read_after_the_kernel_that_wrote_them(sm90):
    """Products start on weights before they wait: a writer just before must have ended."""
    x = torch.randn(4, 4096, device="cuda", dtype=BF16)
    master = torch.randn(8192, 4096, device="cuda", dtype=BF16)
    w, sf = portable.weight_quant_unchecked(master, True)[:2]
    a, a_s = portable.act_quant(x, 128, True)
    wanted = sm90.gemm(a, a_s, w, sf, None, None, GRAN, F32)
    for _ in range(20):
        w, sf = portable.weight_quant_unchecked(master, True)[:2]
        assert same_bits(sm90.gemm(a, a_s, w, sf, None, None, GRAN, F32), wanted)
        del w, sf


@pytest.mark.parametrize(("M", "N", "K", "gran"), [
    (3, 70, 300, GRAN), (200, 70, 300, GRAN), (3, 192, 256, (64, 128)), (0, 192, 256, GRAN),
])  # fmt: skip
def test_what_is_left_to_portable(sm90, M, N, K, gran):
    """Rows that are no multiple of 16 bytes, other grids; and nothing at all."""
    x = torch.randn(M, K, device="cuda", dtype=BF16)
    w = random_codes(N, K, device="cuda")
    sf = random_scale(-(-N // gran[0]), -(-K // gran[1]), dtype=U8, device="cuda")
    assert (M == 0) or sm90.products.refusal(x, w, sf, gran)
    wanted = portable.linear(x, w, sf, None, None, gran, "ue8m0")
    assert same_bits(sm90.linear(x, w, sf, None, None, gran, "ue8m0"), wanted)
    assert same_bits(
        sm90.linear(x, w, sf, None, None, gran, "none"),
        portable.linear(x, w, sf, None, None, gran, "none"),
    )


@pytest.mark.parametrize("M", [2, 65])
def test_offsets_beyond_32_bits(sm90, M, monkeypatch):
    monkeypatch.undo()  # the memory between the rows is never touched
    row = 2**31 + 64
    a, a_s, w, sf = operands(M, 64, 128)
    wanted = sm90.gemm(a, a_s, w, sf, None, None, GRAN, F32)
    far = torch.empty(row + 128, dtype=E4M3, device="cuda").as_strided((2, 128), (row, 1))
    far.copy_(w[:2])
    assert same_bits(sm90.gemm(a, a_s, far, sf, None, None, GRAN, F32), wanted[:, :2])
    if M == 2:
        far.copy_(a)
        assert same_bits(sm90.gemm(far, a_s, w, sf, None, None, GRAN, F32), wanted)
        x = torch.empty(row + 128, dtype=BF16, device="cuda").as_strided((2, 128), (row, 1))
        x.normal_()
        assert same_bits(
            sm90.linear(x, w, sf, None, None, GRAN, "ue8m0"),
            sm90.linear(x.clone(), w, sf, None, None, GRAN, "ue8m0"),
        )


def test_more_results_than_32_bits_count(sm90, monkeypatch):
    monkeypatch.undo()
    a, a_s, w, sf = operands(70000, 32768, 128)
    out = sm90.gemm(a, a_s, w, sf, None, None, GRAN, BF16)
    for start in (0, 2**31 // 32768 - 64, 70000 - 100):
        rows = slice(start, start + 100)
        wanted = sm90.gemm(a[rows], a_s[rows], w, sf, None, None, GRAN, BF16)
        assert same_bits(out[rows], wanted)


@pytest.mark.parametrize(("N", "K"), [(2112, 7168), (7168, 2048)])
def test_deepgemm_has_the_same_bits(sm90, N, K, monkeypatch):
    deep_gemm = pytest.importorskip("vllm.utils.deep_gemm")
    if not deep_gemm.has_deep_gemm():
        pytest.skip("vLLM without DeepGEMM")
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    for M in (7, 64, 300, 2048):
        a, a_s, w, sf = operands(M, N, K, spread=6)
        floats = [torch.ldexp(torch.ones_like(s, dtype=F32), s.int() - 127) for s in (a_s, sf)]
        out = torch.full((M, N), torch.nan, dtype=BF16, device="cuda")
        deep_gemm.fp8_gemm_nt((a, to_layout(floats[0], "mn_major")), (w, floats[1]), out)
        ours = sm90.gemm(a, a_s, w, sf, None, None, GRAN, BF16)
        assert same_bits(ours, out), f"M = {M}"


def test_counters_outlast_the_pool_of_the_weights():
    """vLLM's sleep mode drops what is in that pool, in which a warm-up runs."""
    from vllm_ue8m0.sm90.counters import counters

    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        w = torch.empty(1 << 20, device="cuda")
        count = counters(w, 100)
    segments = [(s["address"], s["total_size"]) for s in pool.snapshot()]

    def inside(tensor):
        return any(start <= tensor.data_ptr() < start + size for start, size in segments)

    assert inside(w) and not inside(count)
    assert count.numel() >= 100 and not count.any()
