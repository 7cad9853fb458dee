"""Experts in the batched format: each has its own rows, of which the first counts[e] are used."""

import pytest
import torch
from checks import NoSynchronization, backends, calc_diff, expert_operands, same_bits

from vllm_ue8m0 import portable, reference, sm100
from vllm_ue8m0.kernels import batched_gemm, config, gemm

U8, F32, BF16, F16 = torch.uint8, torch.float32, torch.bfloat16, torch.float16
ACTIVATIONS = ["ue8m0", "fp32", "none"]
WITH_SM100 = pytest.mark.parametrize(
    ("module", "activation_scale"), backends(portable, sm100, activations=ACTIVATIONS)
)
BACKENDS = pytest.mark.parametrize("module", [reference, portable], ids=["reference", "portable"])
# Rows for each of four experts, of so many that there is room for.
COUNTS = {
    "few": (9, (3, 0, 1, 2)),
    "full": (9, (9, 9, 9, 9)),
    "none": (9, (0, 0, 0, 0)),
    "one expert": (9, (0, 0, 9, 0)),
    "one row": (1, (1, 0, 0, 1)),
    "several tiles": (70, (66, 0, 70, 3)),
}


def operands(kind, device, counts_dtype=torch.int32, **options):
    """Arguments up to gran2; rows that are not used hold NaN, and numbers that would be seen."""
    T, counts = COUNTS[kind]
    _, *weights, _, _, gran13, gran2 = expert_operands(1, 1, device, **options)
    H = weights[0].shape[2]
    x = torch.randn(len(counts), T, H, device=device).to(options.get("dtype", BF16))
    for e, rows in enumerate(counts):
        x[e, rows:] = 3e4
        x[e, rows::2] = torch.nan
    counts = torch.tensor(counts, dtype=counts_dtype, device=device)
    return [x, *weights, counts, gran13, gran2]


def rows_of(out, counts):
    """The used rows of every expert, one after the other."""
    return torch.cat([out[e, :rows] for e, rows in enumerate(counts.tolist())])


def through_experts(module, x, *args):
    """The same rows as tokens of one expert each, weighted with 1."""
    *weights, counts, gran13, gran2, activation_scale = args
    ids = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts.long())
    ones = torch.ones(len(ids), 1, device=x.device)
    tokens = rows_of(x, counts)
    return module.experts(
        tokens, *weights, ones, ids[:, None], gran13, gran2, activation_scale, False
    )


def close(got, wanted, activation_scale):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if got.numel():
        assert wanted.float().abs().max() > 0
        diff = calc_diff(got.double().cpu().numpy(), wanted.double().cpu().numpy())
        # A hidden value next to a rounding boundary may get the neighboring code.
        assert diff < (5e-6 if activation_scale == "none" else 5e-5)


@BACKENDS
@pytest.mark.parametrize("activation_scale", ACTIVATIONS)
@pytest.mark.parametrize("kind", COUNTS)
def test_a_row_is_what_experts_makes_of_it(module, device, monkeypatch, kind, activation_scale):
    # The contiguous format chooses tiles by the average of the rows; on a GPU their sums differ.
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    args = [*operands(kind, device), activation_scale]
    got = rows_of(module.batched_experts(*args), args[7])
    wanted = through_experts(module, *args)
    if module is portable:
        assert same_bits(got, wanted)
    else:  # torch's product of one row may be summed in another order than of several
        close(got, wanted, activation_scale)


@WITH_SM100
@pytest.mark.parametrize(
    ("kind", "counts_dtype"), [("few", torch.int32), ("several tiles", torch.int64)]
)
def test_like_reference(module, device, kind, counts_dtype, activation_scale):
    args = [*operands(kind, device, counts_dtype), activation_scale]
    out = module.batched_experts(*args)
    assert out.shape == args[0].shape and out.is_contiguous()
    got, wanted = (rows_of(o, args[7]) for o in (out, reference.batched_experts(*args)))
    close(got, wanted, activation_scale)


@pytest.mark.parametrize("w_dtype", [U8, F32])
@pytest.mark.parametrize("dtype", [F16, F32])
@pytest.mark.parametrize("inner", [64, 200])
def test_dtypes_factors_and_grids(device, inner, dtype, w_dtype):
    """2 * inner below and above H: the first product lies in out's memory or has its own."""
    args = operands("few", device, inner=inner, dtype=dtype, gran=(32, 32), w_dtype=w_dtype)
    args[3] = torch.rand(args[2].shape[:2], device=device) + 1
    args[6] = torch.rand(args[5].shape[:2], device=device) + 1
    args = [*args[:8], [32, 32], [32, 32], "ue8m0"]
    got, wanted = (m.batched_experts(*args) for m in (portable, reference))
    close(rows_of(got, args[7]), rows_of(wanted, args[7]), "ue8m0")


@BACKENDS
def test_result_is_written_to_out(module, device):
    args = [*operands("few", device), "ue8m0"]
    out = torch.full_like(args[0], torch.nan)
    assert module.batched_experts(*args, out=out) is out
    assert same_bits(rows_of(out, args[7]), rows_of(module.batched_experts(*args), args[7]))


@WITH_SM100
def test_nan_stays_in_its_row(module, device, activation_scale):
    args = [*operands("full", device), activation_scale]
    clean = module.batched_experts(*args)
    args[0][2, 4, 7] = torch.nan
    out = module.batched_experts(*args)
    assert out[2, 4].isnan().all()
    out[2, 4] = clean[2, 4]
    assert same_bits(out, clean)


def test_few_programs_take_many_tiles(device, monkeypatch):
    """More used tiles than programs, in both products and both quantizations."""
    args = [*operands("several tiles", device), "ue8m0"]
    wanted = rows_of(portable.batched_experts(*args), args[7])
    monkeypatch.setattr(config, "MASKED_PROGRAMS", 6)
    assert same_bits(rows_of(portable.batched_experts(*args), args[7]), wanted)


def test_more_counts_than_rows_are_cut(device):
    args = [*operands("full", device), "ue8m0"]
    wanted = portable.batched_experts(*args)
    args[7] = args[7] + 100
    assert same_bits(portable.batched_experts(*args), wanted)


@BACKENDS
def test_no_rows_at_all(module, device):
    args = operands("few", device)
    args[0] = args[0][:, :0]
    args[7] = torch.zeros_like(args[7])
    assert module.batched_experts(*args, "ue8m0").shape == args[0].shape


@pytest.mark.parametrize("activation_scale", ACTIVATIONS)
def test_never_waits_for_the_device(device, activation_scale):
    args = [*operands("few", device), activation_scale]
    # The interpreter itself reads scalars: only the torch operators around it are watched.
    with pytest.MonkeyPatch.context() as patch:
        quant = portable.quant
        for kernel in (batched_gemm, quant.act_quant_kernel, quant.silu_mul_quant_kernel):
            patch.setattr(kernel, "launch", lambda *a: None)
        with NoSynchronization():
            portable.batched_experts(*args)
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        portable.batched_experts(*args)
        with torch.cuda.graph(graph):
            out = portable.batched_experts(*args)
        other = operands("full", device)  # of the same shape
        args[0].copy_(other[0]), args[7].copy_(other[7])
        graph.replay()
        wanted = portable.batched_experts(*args)
        assert same_bits(rows_of(out, args[7]), rows_of(wanted, args[7]))


def test_out_is_all_the_memory_that_products_take(device, monkeypatch):
    """Beside out: the codes of x and of the hidden values, a byte an element, one at a time."""
    args = [*operands("few", device, H=256, inner=128), "ue8m0"]
    E, T, H = args[0].shape
    out, sizes = torch.empty_like(args[0]), []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(empty(*a, **k)) or sizes[-1])
    portable.batched_experts(*args, out=out)
    taken = sum(t.numel() * t.itemsize for t in sizes)
    assert taken == E * T * (H + H // 128 + 128 + 1)


@pytest.mark.parametrize("activation_scale", ACTIVATIONS)
def test_batch_invariant_experts(device, monkeypatch, activation_scale):
    """In such a run a token's bits do not depend on how many rows its experts have besides."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    M = 1500 if device == "cuda" else 80  # for every height of tiles, where that is fast
    args = expert_operands(M, 2, device, E=2, inner=64)
    whole = portable.experts(*args, activation_scale, False)
    heights = set()
    tile_config = gemm.tile_config

    def noted(rows, *rest):
        heights.add(tile_config(rows, *rest)["BLOCK_M"])
        return tile_config(rows, *rest)

    monkeypatch.setattr(gemm, "tile_config", noted)
    for rows in (1, 40):
        part = list(args)
        part[0], part[7], part[8] = (args[i][:rows] for i in (0, 7, 8))
        assert same_bits(portable.experts(*part, activation_scale, False), whole[:rows])
    assert min(heights) >= 64
