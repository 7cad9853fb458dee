"""`tune`: what is timed, what is chosen, and the tables; the reference stands in for kernels."""

import json
from pathlib import Path

import pytest
import torch
from fake_clock import DEVICE, MACHINE, FakeClock

from vllm_ue8m0 import dispatch, portable, reference
from vllm_ue8m0.bench import BenchError, candidates, command, machine, timing, tune
from vllm_ue8m0.bench.candidates import Job, Point
from vllm_ue8m0.bench.gemm import GRAN, SHAPES
from vllm_ue8m0.cli import main
from vllm_ue8m0.kernels import hopper_config as hopper
from vllm_ue8m0.kernels.hopper_config import DecodeConfig, PrefillConfig

SMS = 132
ROWS = {"gemm": (1, 16), "linear": (1, 8), "prefill": (128, 300)}


def product(config, inputs):
    """As candidates.product, by the reference."""
    w, sf = inputs["w"], inputs["sf"]
    assert not inputs["counters"].any()
    if "x" in inputs:
        return [reference.linear(inputs["x"], w, sf, None, None, GRAN, "ue8m0")]
    return [reference.gemm(inputs["a"], inputs["a_s"], w, sf, None, None, GRAN, torch.bfloat16)]


@pytest.fixture
def machine_with_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The directory of its tables."""

    class Yes:
        name = "sm90"

        def supports(self, op, device, explicit):
            return True, "here"

    def clear():
        for cached in (hopper.table, hopper.decode_config, hopper.prefill_config):
            cached.cache_clear()

    monkeypatch.setattr(candidates, "ROWS", ROWS)
    monkeypatch.setattr(candidates, "product", product)
    monkeypatch.setattr(candidates, "compile_all", lambda jobs, workers, say: set())
    monkeypatch.setattr(machine, "require_gpu", lambda otherwise: None)
    monkeypatch.setattr(machine, "describe", lambda: MACHINE)
    monkeypatch.setattr(dispatch, "BACKENDS", (Yes(),))
    monkeypatch.setattr(timing, "CudaClock", lambda rounds: FakeClock())
    monkeypatch.setattr(hopper, "TABLES", tmp_path / "tuned")
    monkeypatch.setattr(hopper, "device_of", lambda index: (MACHINE.gpu, SMS))
    real = tune.tune
    monkeypatch.setattr(tune, "tune", lambda *arguments: real(*arguments, device=DEVICE))
    clear()
    yield tmp_path / "tuned"
    clear()


def test_from_the_command_line_to_what_is_launched(machine_with_gpu: Path, capsys):
    assert main(["tune", "--shape", "192,512", "--rounds", "3", "--workers", "2"]) == 0
    captured = capsys.readouterr()
    path = machine_with_gpu / "Test_GPU.json"
    assert captured.out == f"{path}: 1 shapes\n"
    assert "[1/1] 192,512" in captured.err and "prefill M=300: 7.00 us of " in captured.err
    content = json.loads(path.read_text())
    assert content["gpu"] == "Test GPU" and content["date"] == MACHINE.date
    assert content["versions"] == MACHINE.versions
    found = content["shapes"]["192,512"]
    for op, rows in ROWS.items():
        stored = found["prefill"] if op == "prefill" else found["decode"][op]
        assert list(stored) == [str(M) for M in rows]
        for M in rows:
            entry = stored[str(M)]
            if op == "prefill":
                read = hopper.prefill_config(M, 192, 512, False, 0)
                assert entry == vars(read)
            else:
                read = hopper.decode_config(M, 192, 512, op == "linear", False, 0)
                assert vars(read).items() >= entry.items()
                assert read.splits == found["decode"]["splits"]
            assert read in candidates.configs(Point(op, M, 192, 512), SMS)


def test_other_shapes_are_kept(machine_with_gpu: Path, tmp_path: Path, capsys):
    out = tmp_path / "mine" / "table.json"
    for shape in ("192,512", "64,256", "192,512"):
        assert main(["tune", "--shape", shape, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-2:] == [
        f"{out}: 2 shapes",
        f"It is read from {machine_with_gpu / 'Test_GPU.json'}",
    ]
    assert set(json.loads(out.read_text())["shapes"]) == {"192,512", "64,256"}
    assert len(out.read_text().splitlines()) == 4  # a line for a shape
    assert list(out.parent.iterdir()) == [out] and not machine_with_gpu.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"gpu": "Another GPU", "shapes": {}}', "is the table of Another GPU, this GPU is Test"),
        ("[]", "is not a table of configurations"),
        ('{"gpu": "Test GPU"}', "is not a table of configurations: KeyError('shapes')"),
        ("{", "is not a table of configurations"),
    ],
)
def test_a_file_that_is_no_table_of_this_gpu(
    machine_with_gpu: Path, tmp_path: Path, capsys, text: str, words: str
):
    out = tmp_path / "table.json"
    out.write_text(text)
    assert main(["tune", "--shape", "64,256", "--out", str(out)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vllm-ue8m0 tune: {out}") and words in line
    assert out.read_text() == text


def test_needs_a_gpu_of_sm_90(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-ue8m0 tune: no CUDA device (torch ") and "a table" in line
    monkeypatch.setattr(machine, "require_gpu", lambda otherwise: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert main(["tune"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "only the sm_90 products have tables: needs sm_90, this GPU is sm_89" in line


def run(shapes, clock):
    return list(tune.tune(shapes, clock, SMS, lambda line: None))


def test_the_fastest_are_chosen(machine_with_gpu: Path):
    point = Point("gemm", 16, 192, 512)
    best = candidates.configs(point, SMS)[-1]
    prefill = candidates.configs(Point("prefill", 300, 192, 512), SMS)[-1]
    assert best.splits > 1
    clock = FakeClock({str(best): 1.0, str(prefill): 2.0})
    (((N, K), entry),) = run([(192, 512)], clock)
    assert (N, K) == (192, 512)
    assert entry["decode"]["splits"] == best.splits
    chosen = {k: v for k, v in vars(best).items() if k not in ("tokens", "splits")}
    assert entry["decode"]["gemm"]["16"] == chosen
    assert entry["prefill"]["300"] == vars(prefill)
    assert DecodeConfig(16, splits=best.splits, **chosen) == best
    graphs = [seen for seen in clock.seen if seen[1] != "single"]
    assert len(clock.seen) == 6 and len(graphs) == 5  # 300 rows by single launches
    assert all(calls >= copies and calls >= 20 for _, copies, calls in graphs)


def test_wrong_results_and_failures_name_the_configuration(
    machine_with_gpu: Path, monkeypatch: pytest.MonkeyPatch
):
    point = Point("linear", 8, 192, 512)
    config = candidates.configs(point, SMS)[-1]
    name = f"{point}: {config}"

    def wrong(one, inputs):
        (out,) = product(one, inputs)
        if one == config and len(inputs.get("x", ())) == 8:
            out[3, 100] = 0
        return [out]

    def failing(one, inputs):
        if one == config and len(inputs.get("x", ())) == 8:
            raise RuntimeError("misaligned address")
        return product(one, inputs)

    for broken, words in ((wrong, "wrong result: 1 of 8 rows"), (failing, "misaligned")):
        monkeypatch.setattr(candidates, "product", broken)
        with pytest.raises(BenchError) as error:
            run([(192, 512)], FakeClock())
        assert str(error.value).startswith(f"{name}: {words}")
    monkeypatch.setattr(candidates, "product", product)
    clock = FakeClock(errors={str(config): RuntimeError("operation not permitted")})
    with pytest.raises(BenchError, match="cannot be timed: operation not permitted"):
        run([(192, 512)], clock)


def test_refused_kernels_are_left_out(machine_with_gpu: Path, monkeypatch: pytest.MonkeyPatch):
    point = Point("prefill", 300, 192, 512)
    refused = Job(point, candidates.configs(point, SMS)[0])
    compiled = []

    def compile_all(jobs, workers, say):
        compiled.extend(jobs)
        return {refused.kernel()}

    monkeypatch.setattr(candidates, "compile_all", compile_all)
    clock = FakeClock()
    run([(192, 512)], clock)
    names = {name for seen in clock.seen for name in seen[0]}
    assert str(refused.config) not in names and len(names) == 9
    kernels = [job.kernel() for job in compiled]
    assert refused.kernel() in kernels and len(set(kernels)) == len(kernels)


def test_kernels_are_compiled_once():
    points = [point for shape in SHAPES for point in candidates.points(*shape)]
    every = {Job(point, c).kernel() for point in points for c in candidates.configs(point, SMS)}
    jobs = candidates.jobs(points, SMS)
    assert {job.kernel() for job in jobs} == every and len(jobs) == len(every)
    assert 100 < len(jobs) < 800  # two seconds each, on 16 cores: a bit more than a minute


@pytest.mark.parametrize("shape", SHAPES)
def test_points_and_hopeless_candidates(shape: tuple[int, int]):
    points = candidates.points(*shape)
    assert [(p.op, p.M) for p in points] == [
        (op, M) for op, rows in candidates.ROWS.items() for M in rows
    ]
    for point in points:
        configs = candidates.configs(point, SMS)
        kind = PrefillConfig if point.op == "prefill" else DecodeConfig
        assert configs and all(isinstance(config, kind) for config in configs)
        assert len(configs) <= tune.MOST_CANDIDATES
        assert tune.default(point, SMS) in configs
    few = Point("prefill", 128, *shape)
    costs = [hopper.prefill_cost_us(c, 128, *shape, SMS) for c in candidates.configs(few, SMS)]
    assert max(costs) <= 2 * min(costs)


def decode(splits: int, stages: int = 2) -> DecodeConfig:
    return DecodeConfig(8, 64, stages, splits, 64)


def test_splits_are_those_of_the_best_mean():
    one, two, four = decode(1), decode(2), decode(4)
    slow = decode(2, stages=1)
    times = {
        Point("gemm", 1, 512, 7168): {one: 4.0, two: 2.0, slow: 9.0, four: 1.0},
        Point("gemm", 64, 512, 7168): {one: 2.0, two: 2.2, four: 5.0},
        Point("linear", 8, 512, 7168): {one: 3.0, two: 2.0, four: 2.0},
    }
    # Losses of 1: 4, 1, 1.5; of 2: 2, 1.1, 1; of 4: 1, 2.5, 1.
    assert tune.choose_splits(times) == 2
    times[Point("linear", 64, 512, 7168)] = {one: 4.0, four: 2.0}  # not measured with two
    assert tune.choose_splits(times) == 4
    equal = {Point("gemm", 1, 512, 7168): {four: 3.0, two: 3.0, one: 3.0}}
    assert tune.choose_splits(equal) == 1


def test_rows_of_16_bytes(machine_with_gpu: Path):
    with pytest.raises(BenchError, match="192,500: the sm_90 kernels want K to be a multiple of"):
        run([(192, 500)], FakeClock())


def test_compiling_processes_report_errors():
    lines = []
    if torch.cuda.is_available():
        pytest.skip("the jobs below would work")
    point = Point("gemm", 1, 64, 256)
    with pytest.raises(BenchError) as error:
        candidates.compile_all(candidates.jobs([point], SMS)[:1], 1, lines.append)
    assert str(error.value).startswith(f"{point}: DecodeConfig(tokens=8, ")
    assert lines[0] == "compiling 1 kernels in 1 processes"


def test_deepseeks_shapes_by_default(machine_with_gpu: Path, monkeypatch, capsys):
    asked = []

    def tuned(shapes, clock, sms, say, workers):
        asked.append((shapes, sms, workers))
        yield (64, 128), {"decode": {}}

    monkeypatch.setattr(tune, "tune", tuned)
    command.tune([], None, None, None)
    assert asked == [(SHAPES, SMS, None)]


def test_a_configuration_is_launched_as_serving_does(monkeypatch: pytest.MonkeyPatch):
    decode_gemm = pytest.importorskip("vllm_ue8m0.kernels.decode_gemm")
    prefill_gemm = pytest.importorskip("vllm_ue8m0.kernels.prefill_gemm")
    launched = []
    monkeypatch.setattr(decode_gemm, "launch", lambda *a: launched.append(("decode", *a)))
    monkeypatch.setattr(prefill_gemm, "launch", lambda *a: launched.append(("prefill", *a)))
    monkeypatch.setattr(candidates, "device_of", lambda index: ("Test GPU", SMS))
    monkeypatch.setattr(portable, "act_quant", reference.act_quant)
    generator = torch.Generator(DEVICE).manual_seed(0)
    weights = tune._weights(generator, 192, 512, FakeClock())
    codes = tune._activations(generator, Point("gemm", 16, 192, 512))
    bf16 = tune._activations(generator, Point("linear", 16, 192, 512))
    counters = weights[0]["counters"]
    assert counters.dtype == torch.int32 and len(counters) >= 280 and not counters.any()
    fused, unfused = DecodeConfig(16, 64, 2, 1, 3, True), DecodeConfig(16, 64, 2, 1, 3)
    for config, activations in (
        (unfused, codes),
        (unfused, bf16),
        (fused, bf16),
        (PrefillConfig(128, 64, 8), codes),
        (PrefillConfig(128, 64, 8, 2), codes),
        (DecodeConfig(16, 64, 2, 2, 6), codes),
    ):
        (out,) = candidates.product(config, {**weights[0], **activations})
        kernel, a, a_s, w, sf, c, bias, given, used, counts, *rest = launched.pop()
        assert kernel == ("decode" if isinstance(config, DecodeConfig) else "prefill")
        assert (used, c, bias) == (config, None, None) and given is out
        assert out.shape == (16, 192) and out.dtype == torch.bfloat16
        assert w is weights[0]["w"] and sf is weights[0]["sf"]
        assert counts is (weights[0]["counters"] if config.splits > 1 else None)
        assert rest == ([True, 105] if kernel == "decode" else [SMS])
        if config == fused:
            assert a is bf16["x"] and a_s is None
        else:
            assert a.dtype == torch.float8_e4m3fn and a_s.stride() == (1, 16)
