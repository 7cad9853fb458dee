"""The portable backend's linear and experts as a whole, and sm100's, which are built on them."""

import golden
import numpy as np
import pytest
import torch
from checks import (
    E4M3,
    NoSynchronization,
    assert_product,
    backends,
    calc_diff,
    expert_operands,
    random_codes,
    random_scale,
    same_bits,
)

from vllm_ue8m0 import portable, reference, sm100
from vllm_ue8m0.kernels import grouped_gemm

U8, F32, BF16 = torch.uint8, torch.float32, torch.bfloat16
GRAN = (128, 128)
ACTIVATIONS = ["ue8m0", "fp32", "none"]
BACKENDS = pytest.mark.parametrize("module", backends(reference, portable, sm100))
KERNELS = pytest.mark.parametrize(
    ("module", "activation_scale"), backends(portable, sm100, activations=ACTIVATIONS)
)


@KERNELS
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize(("M", "gran"), [(1, GRAN), (17, (64, 64))])
def test_linear(module, device, M, gran, dtype, activation_scale):
    N, K = 150, 300
    x = torch.randn(M, K, device=device).to(dtype)
    w, bias = random_codes(N, K, device=device), torch.randn(N, device=device).to(dtype)
    grid = -(-N // gran[0]), -(-K // gran[1])
    sf = random_scale(*grid, dtype=U8, device=device)
    c = torch.rand(grid[0], device=device) + 1
    out = module.linear(x, w, sf, c, bias, gran, activation_scale)
    assert out.dtype == dtype
    if activation_scale == "none":
        a = x.double().cpu().numpy()
    else:
        q, s = reference.act_quant(x, gran[1], activation_scale == "ue8m0")
        a = golden.dequantize(q, s, (1, gran[1]))
    scale = np.repeat(c.double().cpu().numpy(), gran[0])[:N]
    assert_product(out, a, golden.dequantize(w, sf, gran), (scale, bias.double().cpu().numpy()))


def test_linear_of_no_rows(device):
    w, sf = random_codes(70, 128, device=device), torch.ones(1, 1, device=device)
    for activation_scale in ACTIVATIONS:
        x = torch.zeros(0, 128, dtype=BF16, device=device)
        assert portable.linear(x, w, sf, None, None, GRAN, activation_scale).shape == (0, 70)


def close_to_reference(args, activation_scale, weight_on_input=False, module=portable):
    out = module.experts(*args, activation_scale, weight_on_input)
    wanted = reference.experts(*args, activation_scale, weight_on_input)
    assert out.dtype == wanted.dtype and out.shape == wanted.shape and out.is_contiguous()
    assert wanted.float().abs().max() > 0
    # A hidden value next to a rounding boundary may get the neighboring code.
    diff = calc_diff(out.double().cpu().numpy(), wanted.double().cpu().numpy())
    assert diff < (5e-6 if activation_scale == "none" else 5e-5)
    return out


@pytest.mark.parametrize("activation_scale", ACTIVATIONS)
@pytest.mark.parametrize(("M", "topk"), [(1, 2), (17, 3)])
def test_experts_stage_by_stage(device, monkeypatch, M, topk, activation_scale):
    """Each product against float64 of the operands that it was given; the sum bit for bit."""
    args = expert_operands(M, topk, device)
    calls, launch = [], grouped_gemm.launch
    monkeypatch.setattr(grouped_gemm, "launch", lambda *a: (calls.append(a), launch(*a)))
    out = portable.experts(*args, activation_scale, False)
    x, w13, sf13, _, w2, sf2, _, topk_weights, ids, gran, _ = args

    def values(a, a_s):
        return a.double().cpu().numpy() if a_s is None else golden.dequantize(a, a_s, (1, 128))

    (a, a_s, *_, order, _, _, _, _, _, gate_up), (hidden, hidden_s, *_, products) = calls
    kept = reference.fake_quant(x, 128, activation_scale).double().cpu().numpy()
    np.testing.assert_array_equal(values(a, a_s).astype(np.float32), kept)
    kept = reference.fake_quant(
        portable.products._silu_mul(gate_up, 128, "none")[0], 128, activation_scale
    )
    np.testing.assert_array_equal(
        values(hidden, hidden_s).astype(np.float32), kept.double().cpu().numpy()
    )
    for e in range(w13.shape[0]):
        rows = (ids.flatten()[order] == e).nonzero().flatten().cpu().numpy()
        if rows.size == 0:
            continue
        slot = order.cpu().numpy()[rows]
        weight = topk_weights.flatten().double().cpu().numpy()[slot, None]
        w64 = golden.dequantize(w13[e], sf13[e], gran)
        assert_product(gate_up[rows], values(a, a_s)[slot // topk], w64)
        w64 = golden.dequantize(w2[e], sf2[e], gran)
        assert_product(products[slot], values(hidden, hidden_s)[rows], w64, (weight, 0.0))
    wanted = torch.zeros(M, x.shape[1], device=device)
    for k in range(topk):
        wanted += products.view(M, topk, -1)[:, k].float()
    assert same_bits(out, wanted.to(BF16))


@KERNELS
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["some_skipped", "one_expert", "all_skipped"])
def test_experts_like_reference(module, device, kind, ids_dtype, activation_scale):
    args = expert_operands(9, 2, device)
    ids = args[8].to(ids_dtype)
    if kind == "some_skipped":
        ids[2], ids[3, 0], ids[5, 1] = -1, -1, -1
    else:
        ids[:] = 3 if kind == "one_expert" else -1
    args[8] = ids
    if kind == "all_skipped":
        assert (module.experts(*args, activation_scale, False) == 0).all()
    else:
        out = close_to_reference(args, activation_scale, module=module)
        assert kind != "some_skipped" or (out[2] == 0).all()


@pytest.mark.parametrize("w_dtype", [U8, F32])
@pytest.mark.parametrize("dtype", [torch.float16, F32])
def test_experts_dtypes_factors_and_grids(device, dtype, w_dtype):
    args = expert_operands(5, 2, device, dtype=dtype, gran=(32, 32), w_dtype=w_dtype)
    args[3] = torch.rand(args[2].shape[:2], device=device) + 1
    args[6] = torch.rand(args[5].shape[:2], device=device) + 1
    args[9], args[10] = list(args[9]), list(args[10])
    close_to_reference(args, "ue8m0")


@pytest.mark.parametrize("activation_scale", ["ue8m0", "none"])
def test_experts_weight_on_input(device, activation_scale):
    close_to_reference(expert_operands(9, 1, device), activation_scale, weight_on_input=True)


def test_experts_of_float32_against_float64(device):
    """Nothing is quantized or rounded to bf16 on the way: the whole product in one comparison."""
    args = expert_operands(9, 3, device, dtype=F32)
    x, w13, sf13, _, w2, sf2, _, weights, ids, gran, _ = args
    out = portable.experts(*args, "none", False).double().cpu().numpy()
    wanted = np.zeros(out.shape)
    for m in range(9):
        for k, e in enumerate(ids[m].tolist()):
            gate_up = golden.dequantize(w13[e], sf13[e], gran) @ x[m].double().cpu().numpy()
            gate, up = np.split(gate_up, 2)
            hidden = gate / (1 + np.exp(-gate)) * up
            wanted[m] += weights[m, k].item() * golden.dequantize(w2[e], sf2[e], gran) @ hidden
    assert calc_diff(out, wanted) < 1e-9
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@BACKENDS
@pytest.mark.parametrize("activation_scale", ACTIVATIONS)
def test_experts_of_integers_are_exact(module, device, activation_scale):
    """gate = 32, so silu rounds to 32; up in [-4, 4]: every step is exact but two roundings."""
    M, topk, E, H, I = 9, 2, 3, 192, 160  # noqa: E741
    x = torch.zeros(M, H)
    x.scatter_(1, torch.rand(M, H - 1).argsort(1)[:, :4] + 1, 1.0)
    x[:, 0] = 1
    w13 = torch.randint(-1, 2, (E, 2 * I, H)).float()
    w13[:, I:, 0] = 0
    w13[:, :I], w13[:, :I, 0] = 0, 32
    w2 = torch.randint(-2, 3, (E, H, I)).float()
    ids = torch.rand(M, E).argsort(1)[:, :topk]
    weights = torch.tensor([0.5, 0.75]).repeat(M, 1)
    up = torch.einsum("mh,mtih->mti", x, w13[:, I:][ids])
    products = torch.einsum("mti,mthi->mth", 32 * up, w2[ids]) * weights[..., None]
    wanted = products.to(BF16).float().sum(1).to(BF16)

    def ones(N, K):
        grid = E, -(-N // 128), -(-K // 128)
        if activation_scale == "fp32":
            return torch.ones(grid, device=device)
        return torch.full(grid, 127, dtype=U8, device=device)

    out = module.experts(
        x.to(device, BF16), w13.to(device, E4M3), ones(2 * I, H), None,
        w2.to(device, E4M3), ones(H, I), None, weights.to(device), ids.to(device),
        GRAN, GRAN, activation_scale, False,
    )  # fmt: skip
    if activation_scale == "fp32":  # the scales amax / 448 are not exact
        assert calc_diff(out.double().cpu().numpy(), wanted.double().numpy()) < 1e-3
    else:
        assert same_bits(out, wanted.to(device))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_experts_of_other_ranks(module, device, dtype):
    """expert_map translates ids of 11 experts; elsewhere, padding and unknown ones are -1."""
    *args, _, gran13, gran2 = expert_operands(9, 3, device)
    expert_map = torch.full((11,), -1, dtype=torch.int32, device=device)
    expert_map[torch.tensor([7, 2, 10, 4])] = torch.arange(4, dtype=torch.int32, device=device)
    ids = torch.randint(-1, 13, (9, 3), device=device).to(dtype)
    ids[0], ids[1] = torch.tensor([7, 2, 2]), torch.tensor([-1, 11, 3])
    table = [*expert_map.tolist(), -1, -1, -1]  # the last one is that of -1
    local = torch.tensor([table[i] for i in ids.reshape(-1).tolist()]).reshape(9, 3).to(device)
    rest = (gran13, gran2, "ue8m0", False)
    wanted = module.experts(*args, local, *rest)
    assert (wanted[0] != 0).any() and (wanted[1] == 0).all()
    out = torch.full_like(wanted, torch.nan)
    assert module.experts(*args, ids, *rest, expert_map, out) is out
    assert same_bits(out, wanted)


@KERNELS
def test_experts_nan_stays_in_its_token_and_repeats_are_equal(module, device, activation_scale):
    args = expert_operands(9, 2, device)
    clean = [module.experts(*args, activation_scale, False) for _ in range(3)]
    assert same_bits(clean[0], clean[1]) and same_bits(clean[0], clean[2])
    args[0][4, 7] = torch.nan
    out = module.experts(*args, activation_scale, False)
    assert out[4].isnan().all()
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(out[keep], clean[0][keep])


@pytest.mark.parametrize("activation_scale", ACTIVATIONS)
def test_experts_of_no_tokens(device, activation_scale):
    out = portable.experts(*expert_operands(0, 2, device), activation_scale, False)
    assert out.shape == (0, 192)


@pytest.mark.parametrize("activation_scale", ACTIVATIONS)
def test_experts_never_wait_for_the_device(device, activation_scale):
    args = expert_operands(5, 2, device)
    wanted = portable.experts(*args, activation_scale, False)
    # The interpreter itself reads scalars: only the torch operators around it are watched.
    with pytest.MonkeyPatch.context() as patch:
        for kernel in ("launch", "combine"):
            patch.setattr(grouped_gemm, kernel, lambda *a: None)
        for kernel in (portable.quant.act_quant_kernel, portable.quant.silu_mul_quant_kernel):
            patch.setattr(kernel, "launch", lambda *a: None)
        with NoSynchronization():
            portable.experts(*args, activation_scale, False)
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = portable.experts(*args, activation_scale, False)
        args[0].copy_(args[0].flip(0)), args[8].copy_(args[8].flip(0))
        args[7].copy_(args[7].flip(0))
        graph.replay()
        assert torch.equal(out, wanted.flip(0))
