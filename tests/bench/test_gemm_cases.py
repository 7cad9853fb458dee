"""The products' cases: what is measured, how many bytes and flops, and a gate that refuses errors.

On the CPU `reference` stands in for a backend.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_clock import DEVICE, MACHINE, FakeClock

from vllm_ue8m0 import agreement, portable, reference
from vllm_ue8m0.bench import GEMM_BENCHES, BenchError, gemm
from vllm_ue8m0.bench.case import tensor_bytes
from vllm_ue8m0.bench.roof import Roof
from vllm_ue8m0.bench.run import run
from vllm_ue8m0.layouts import to_layout

ALL = gemm.cases(reference, reference)
ROOF = Roof(3.0, 1500.0)


def make(bench, backend=reference, M=5, N=300, K=384, scale="ue8m0"):
    if bench == "decode_linear":
        return gemm.linear(backend, M, N, K, scale)
    return gemm.gemm(backend, bench, M, N, K, scale)


def draw(case, seed=0):
    return case.inputs(torch.Generator().manual_seed(seed))


def measure(case, clock):
    """Without peers, of which an installed one would compile for minutes: test_gemm_peers.py."""
    case = replace(case, peers={}, context={})
    (record,) = run([case], clock, MACHINE, lambda line: None, DEVICE, ROOF)
    return record


def test_every_shape_is_measured_in_every_benchmark():
    sizes = {bench: {(c.M, c.N, c.K) for c in ALL if c.bench == bench} for bench in GEMM_BENCHES}
    rows = dict(zip(GEMM_BENCHES, [(512, 2048, 8192), (128, 256), (1, 16, 64), (1, 8, 16, 32)],
                    strict=True))  # fmt: skip
    cube = {(8192, 8192, 8192)}
    for bench, found in sizes.items():
        wanted = {(M, *shape) for M in rows[bench] for shape in gemm.SHAPES}
        assert found == wanted | (cube if bench == "prefill_gemm" else set())
    assert len(gemm.SHAPES) == len(set(gemm.SHAPES)) == 14
    assert len({str(case) for case in ALL}) == len(ALL)
    for bench in GEMM_BENCHES:
        for M in rows[bench]:
            scales = [c.variant["scale"] for c in ALL if (c.bench, c.M) == (bench, M)]
            assert scales.count("fp32") == 3


def test_selections():
    quick = gemm.cases(reference, reference, quick=True)
    assert [(c.bench, c.M, c.N, c.K) for c in quick] == [
        (bench, M, 4096, 7168)
        for bench, ends in zip(
            GEMM_BENCHES, [(512, 8192), (128, 256), (1, 64), (1, 32)], strict=True
        )
        for M in ends
    ]
    own = [(64, 128), (2112, 7168)]
    only = gemm.cases(reference, reference, only=["decode_linear"], shapes=own)
    assert [(c.M, c.N, c.K) for c in only if c.variant["scale"] == "ue8m0"] == [
        (M, *shape) for shape in own for M in (1, 8, 16, 32)
    ]
    assert len(only) == 12  # float32 scales for the second
    quick = gemm.cases(reference, reference, quick=True, shapes=own)
    assert {(c.N, c.K) for c in quick} == {(64, 128)}


def test_prefill_is_timed_by_single_launches_and_beside_cublas():
    for case in ALL:
        assert case.single == (case.bench in ("prefill_gemm", "middle_gemm"))
        assert bool(case.context) == (case.bench == "prefill_gemm")
        linear = case.bench == "decode_linear"
        assert next(iter(case.peers)) == ("vllm_quant_deepgemm" if linear else "deepgemm")


def test_bytes_and_flops_by_hand():
    (case,) = (c for c in ALL if (c.bench, c.M, c.N, c.K) == ("decode_gemm", 16, 7168, 256))
    # codes and scales of a, of w, bf16 out
    assert case.num_bytes == 16 * 256 + 16 * 2 + 7168 * 256 + 56 * 2 + 2 * 16 * 7168
    assert case.flops == 2 * 16 * 7168 * 256
    (case,) = (c for c in ALL if (c.bench, c.M, c.N, c.K) == ("decode_linear", 8, 7168, 256))
    assert case.num_bytes == 2 * 8 * 256 + 7168 * 256 + 56 * 2 + 2 * 8 * 7168


@pytest.mark.parametrize("bench", GEMM_BENCHES)
@pytest.mark.parametrize("scale", ["ue8m0", "fp32"])
def test_bytes_are_those_of_the_tensors(bench: str, scale: str):
    case = make(bench, scale=scale)
    inputs = draw(case)
    own = {name: inputs[name] for name in ("x", "a", "a_s", "w", "sf") if name in inputs}
    assert case.num_bytes == tensor_bytes(own) + tensor_bytes(case.ours(inputs))
    dtype = torch.uint8 if scale == "ue8m0" else torch.float32
    assert inputs["sf"].dtype == inputs.get("a_s", inputs["sf"]).dtype == dtype
    assert inputs["w_s"].dtype == torch.float32
    mantissas = torch.frexp(inputs["w_s"])[0]
    assert bool((mantissas == 0.5).all()) == (scale == "ue8m0")


@pytest.mark.parametrize("bench", GEMM_BENCHES)
@pytest.mark.parametrize("scale", ["ue8m0", "fp32"])
@pytest.mark.parametrize("backend", [reference, portable], ids=["reference", "portable"])
def test_cases_run(bench: str, scale: str, backend, poison):
    clock = FakeClock({"ours": 2.0})
    case = make(bench, backend, scale=scale)
    record = measure(case, clock)
    assert (record.bench, record.M, record.N, record.K) == (bench, 5, 300, 384)
    assert (record.ours_us, record.flops) == (2.0, case.flops)
    assert record.roof == {"tb_per_s": 3.0, "tflops": 1500.0}
    assert record.limit_us == round(case.num_bytes / 3e6, 3)
    assert record.ours.startswith(backend.__name__.rpartition(".")[2])
    names, *how = clock.seen[0]
    assert (how == ["single"]) == case.single
    assert names == ["ours"]  # neither a copy nor an empty kernel
    assert record.variant["scale"] == scale


def test_the_roof_is_bytes_or_flops():
    assert ROOF.time_us(3_000_000, 1) == pytest.approx(1.0)
    assert ROOF.time_us(1, 3_000_000_000) == pytest.approx(2.0)


def test_scales_come_in_the_layout_that_a_backend_asks_for():
    seen = []

    def product(a, a_s, *rest):
        seen.append(a_s)
        return reference.gemm(a, a_s, *rest)

    backend = SimpleNamespace(__name__="other", gemm=product, GEMM_SCALE_LAYOUT="mn_major")
    case = make("decode_gemm", backend)
    inputs = draw(case)
    assert case.check(inputs, case.ours(inputs)) is None
    assert seen[0].stride() == to_layout(inputs["a_s"].contiguous(), "mn_major").stride() == (1, 16)
    assert case.variant["layout"] == "mn_major"


def test_records_say_which_kernel_ran():
    backend = SimpleNamespace(__name__="sm90", describe=lambda op, M, N, K: f"{op} {M} {N} {K}")
    assert make("decode_gemm", backend).implementation == "gemm 5 300 384"
    assert make("decode_linear", backend).implementation == "linear 5 300 384"
    assert make("decode_gemm").implementation == "reference"
    wanted = "portable gemm, tile 16 x 64 x 128, 4 warps"
    assert make("decode_gemm", portable).implementation == wanted


def one_value(out):
    out[2, 7] = 0


def one_row(out):
    out[4] *= 1.01


def nan(out):
    out[0, 0] = torch.nan


def last_tile(out):
    out[:, 256:] = out[:, :44]


@pytest.mark.parametrize("bench", ["decode_gemm", "decode_linear"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (one_value, "1 of 5 rows differ, calc_diff up to"),
        (one_row, "1 of 5 rows differ"),
        (nan, "1 of 5 rows differ, calc_diff up to inf (allowed: 5e-06)"),
        (last_tile, "5 of 5 rows differ"),
    ],
)
def test_the_gate_catches(bench: str, damage, words: str):
    def faulty(op, *arguments):
        out = getattr(reference, op)(*arguments)
        damage(out)
        return out

    backend = SimpleNamespace(
        __name__="faulty",
        gemm=lambda *a: faulty("gemm", *a),
        linear=lambda *a: faulty("linear", *a),
    )
    with pytest.raises(BenchError, match="wrong result of faulty") as error:
        measure(make(bench, backend), FakeClock())
    assert words in str(error.value)


def test_the_gate_wants_bf16_of_the_right_shape():
    case = make("decode_gemm")
    inputs = draw(case)
    (out,) = case.ours(inputs)
    assert case.check(inputs, [out]) is None
    assert "is torch.float16 (5, 300)" in case.check(inputs, [out.half()])
    assert "is torch.bfloat16 (5, 299)" in case.check(inputs, [out[:, :299]])
    assert "is torch.bfloat16 (5, 299)" in case.agree([out], [out[:, :299]])


def test_one_wrong_value_in_the_widest_row_is_caught():
    row = torch.randn(1, 36864, generator=torch.Generator().manual_seed(0))
    rounded = row.to(torch.bfloat16)
    assert float(agreement.calc_diff(row, rounded)) < agreement.PRODUCT_DIFF / 3
    rounded[0, int((row.abs() - 1).abs().argmin())] = 0
    assert float(agreement.calc_diff(row, rounded)) > agreement.PRODUCT_DIFF
