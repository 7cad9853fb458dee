"""The rules that choose configurations of the sm_90 products, for every size a layer may have."""

import inspect

import pytest
import torch

from vllm_ue8m0 import portable, sm90
from vllm_ue8m0.bench.gemm import SHAPES
from vllm_ue8m0.kernels import hopper_config as rules
from vllm_ue8m0.layouts import ceil_div
from vllm_ue8m0.sm90 import counters, products

SMS = 132
ODD_SHAPES = (
    (16, 16),
    (1, 128),
    (130, 144),
    (1000, 1040),
    (64, 65536),
    (262144, 65536),
    (262144, 128),
)
SIZES = SHAPES + ODD_SHAPES
ROWS = (1, 2, 7, 8, 9, 16, 17, 33, 64)
MANY_ROWS = (65, 127, 128, 129, 300, 1024, 1025, 2048, 8192, 65537)


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    """Rules for an H100 without a table."""
    monkeypatch.setattr(rules, "device_of", lambda index: ("a GPU without a table", SMS))
    for cached in (rules.decode_config, rules.prefill_config):
        cached.cache_clear()
    yield
    for cached in (rules.decode_config, rules.prefill_config):
        cached.cache_clear()


def parts(K, splits):
    """Pairs of blocks of K in each part, as the kernels divide them."""
    pairs = ceil_div(ceil_div(K, 128), 2)
    return [(i + 1) * pairs // splits - i * pairs // splits for i in range(splits)]


@pytest.mark.parametrize(("N", "K"), SIZES)
@pytest.mark.parametrize("linear", [False, True])
def test_few_rows(N, K, linear):
    NK, splits_of_rows = ceil_div(K, 128), set()
    for M in ROWS:
        config = rules.decode_config(M, N, K, linear, False, 0)
        splits_of_rows.add(config.splits)
        assert config.tokens in (8, 16, 32, 64) and config.tokens >= M
        assert config.tokens == 8 or config.tokens < 2 * M
        assert 1 <= config.stages <= rules.decode_stages(config, NK, rules.SHARED_BYTES)
        assert config.programs >= config.splits and config.programs % config.splits == 0
        tiles = ceil_div(N, config.block_n)
        assert config.programs <= min(2 * SMS, tiles * config.splits)
        assert min(parts(K, config.splits)) >= 1
        blocks = config.blocks(NK)
        assert blocks & (blocks - 1) == 0 and blocks >= 2 * max(parts(K, config.splits))
        assert linear or not config.fused
    # A row's result does not depend on M.
    assert splits_of_rows == {rules.default_splits(N, K, SMS)}


def test_splits_know_nothing_of_rows():
    assert list(inspect.signature(rules.default_splits).parameters) == ["N", "K", "sms"]


def test_splits_fill_the_gpu_and_no_more():
    for N, K in SIZES:
        splits, tiles = rules.default_splits(N, K, SMS), ceil_div(N, 64)
        assert splits == 1 or (tiles < SMS // 2 and tiles * splits < 2 * SMS)
    assert rules.default_splits(4608, 7168, SMS) == 1  # 72 tiles
    assert rules.default_splits(2112, 7168, SMS) == 4
    assert rules.default_splits(512, 128, SMS) == 1  # nothing to divide


def test_two_programs_share_an_sm_where_they_fit():
    """The next kernel's first weights come while this one ends."""
    for N, K in SHAPES:
        config = rules.decode_config(16, N, K, False, False, 0)
        room = rules.decode_stages(config, ceil_div(K, 128), rules.HALF_SHARED_BYTES)
        assert config.stages <= room, (N, K, config)


@pytest.mark.parametrize(("N", "K"), SIZES)
def test_batch_invariant_runs_divide_nothing(N, K):
    for M in ROWS:
        for linear in (False, True):
            config = rules.decode_config(M, N, K, linear, True, 0)
            room = rules.decode_stages(config, ceil_div(K, 128), rules.SHARED_BYTES)
            assert config.splits == 1 and 1 <= config.stages <= room
    for M in MANY_ROWS:
        assert rules.prefill_config(M, N, K, True, 0).splits == 1


@pytest.mark.parametrize(("N", "K"), SIZES)
def test_many_rows(N, K):
    for M in MANY_ROWS:
        splits = rules.prefill_splits(M, N, K, 132)
        assert splits == (1 if M > 256 else rules.prefill_splits(65, N, K, 132))
        candidates = list(rules.prefill_candidates(M, N, K, splits))
        assert rules.prefill_config(M, N, K, False, 0) in candidates
        assert {c.splits for c in candidates} == {splits}
        for config in candidates:
            # 128 rows walk the ring by two blocks; 256 rows keep two sums, of which parts have one.
            assert config.block_m == 256 or config.stages % 2 == 0
            assert config.block_m == 128 or config.splits == 1
            assert min(parts(K, config.splits)) >= 1
            float_scales = config.block_m * (128 + 4)
            ring = config.stages * (float_scales + config.block_n * 128)
            assert ring + 1024 <= rules.SHARED_BYTES


def test_every_number_of_rows_has_one_kernel():
    for M in range(1, 200):
        config = products._choose(M, 4096, 7168, False, 0)
        few = isinstance(config, rules.DecodeConfig)
        assert few == (M <= rules.MAX_DECODE_ROWS)
        assert not few or config.tokens == rules.tokens(M) >= M


def test_batch_invariance_is_vllms_variable(monkeypatch):
    for value, splits in (("0", 4), ("", 4), ("1", 1)):
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", value)
        assert products.batch_invariant() == (splits == 1)
        assert products._choose(16, 2112, 7168, True, 0).splits == splits


def codes(rows, columns, pitch=None, offset=0):
    pitch = pitch or columns
    memory = torch.zeros(offset + rows * pitch + 64, dtype=torch.uint8)
    offset += -memory.data_ptr() % 16
    memory = memory.view(products.E4M3)
    return memory.as_strided((rows, columns), (pitch, 1), offset)


def test_refusals():
    sf, gran = torch.zeros(1, 2, dtype=torch.uint8), (128, 128)

    def refused(a, w, gran, sf=sf):
        return products.refusal(a, w, sf, gran)

    a, w = codes(4, 256), codes(128, 256)
    assert refused(a, w, gran) is None
    assert "64x128, not 128x128" in refused(a, w, (64, 128))
    for name, odd in (("pitch", codes(128, 250)), ("offset", codes(128, 256, offset=8))):
        assert "rows of w do not start" in refused(a, odd, gran), name
        assert "rows of a do not start" in refused(odd, w, gran), name
    assert refused(codes(4, 250, pitch=256), codes(128, 250, pitch=272), gran) is None
    # Activations, which kernels read by themselves, may lie anywhere, but not their codes.
    assert refused(torch.zeros(4, 257)[:, 1:], w, gran) is None
    assert "not a multiple of 16" in refused(torch.zeros(4, 250), codes(128, 250, pitch=256), gran)
    wide = codes(1, rules.MAX_K + 16)
    assert "do not fit" in refused(wide, wide, gran)
    # Nothing that products start on before they wait may be a copy made for them.
    assert "w has strides 1, 128" in refused(a, codes(256, 128).t(), gran)
    assert "w has strides 0, 1" in refused(a, codes(1, 256).expand(128, 256), gran)
    assert "scales of w" in refused(a, w, gran, sf.to(torch.bfloat16))
    assert "scales of w" in refused(a, w, gran, torch.zeros(2, 2, dtype=torch.uint8).t())


def test_rings_of_a_chain():
    """As deep as an SM has room for, up to four stages."""
    from vllm_ue8m0.kernels.expert_config import experts_config

    def chain(M, inner, E=256, scale_bytes=1):
        return experts_config(M, 8, E, 256, 7168, inner, scale_bytes, False, 132).chain

    assert chain(2, 256) == chain(512, 2048) == chain(16, 2048, 32) == 4
    assert chain(512, 128 * 8192, scale_bytes=4) == 2  # scales of a long K take the room
    assert chain(1, 256) is chain(2048, 2048) is None


def test_tall_tiles_take_the_place_of_more_than_a_wave():
    from vllm_ue8m0.kernels.expert_config import experts_config

    def tall(M, inner, E=256):
        config = experts_config(M, 8, E, 256, 7168, inner, 1, False, 132)
        return config.tall, config.least_tall

    assert tall(16, 2048) == (0, 0)  # no expert has more rows than a tile
    assert tall(17, 2048) == (1, 9)
    assert tall(128, 2048, 32) == (2, 9)
    # 15 experts at most of two tiles, two units each.
    assert tall(32, 256) == (0, 0)
    assert tall(512, 256) == (2, 67)
    assert tall(2048, 2048) == (0, 0)  # every tile is tall


def test_experts_of_float32_activations_are_portable():
    """Launched and warmed up: both ask the same."""
    w13, w2 = (codes(256, 128).view(1, *shape) for shape in ((256, 128), (256, 128)))
    sf, gran = torch.zeros(1, 2, 1, dtype=torch.uint8), (128, 128)
    rest = w13, sf, w2, sf, gran, gran, "ue8m0"
    x = torch.zeros(4, 128, dtype=torch.bfloat16)
    assert sm90.experts_refusal(x, *rest) is None
    assert "float32" in sm90.experts_refusal(x.float(), *rest)
    plans = [backend.experts_plan(x.float(), *rest, 2, 1) for backend in (sm90, portable)]
    assert plans[0](64) == plans[1](64)


@pytest.fixture
def launches(monkeypatch):
    """The arguments of every launch, and of every act_quant, whose results are given."""
    a, a_s, seen = codes(100, 2048), torch.zeros(100, 16, dtype=torch.uint8), []

    def act_quant(x, group, ue8m0, layout):
        seen.append(("act_quant", x, group, ue8m0, layout))
        return a[: len(x)], a_s[: len(x)]

    monkeypatch.setattr(products.portable, "act_quant", act_quant)
    monkeypatch.setattr(products, "device_of", rules.device_of)
    monkeypatch.setattr(products, "counters", lambda w, count: f"{count} zeros")
    for name in ("decode_gemm", "prefill_gemm"):
        launch = lambda *arguments, name=name: seen.append((name, *arguments))  # noqa: E731
        monkeypatch.setattr(getattr(products, name), "launch", launch)
    return seen


W, SF = codes(640, 2048), torch.zeros(5, 16, dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["ue8m0", "fp32"])
def test_activations_are_quantized_inside_or_before(launches, kind):
    x, ue8m0 = torch.zeros(100, 2048), kind == "ue8m0"
    products.linear(x[:1], W, SF, None, None, (128, 128), kind)
    ((kernel, a, a_s, *_, config, _, how, floor),) = launches
    assert kernel == "decode_gemm" and a.dtype == torch.float32 and a_s is None
    assert config.fused and (how, floor) == (ue8m0, 105)
    for M, name in ((40, "decode_gemm"), (100, "prefill_gemm")):
        launches.clear()
        products.linear(x[:M], W, SF, None, None, (128, 128), kind)
        (quantizer, given, *rest), (kernel, a, a_s, *_) = launches
        assert (quantizer, len(given), rest) == ("act_quant", M, [128, ue8m0, "mn_major"])
        assert kernel == name and a.dtype == products.E4M3 and a_s.shape == (M, 16)


def test_codes_are_multiplied_as_they_are(launches):
    a, a_s = codes(100, 2048), torch.arange(1600).view(100, 16).to(torch.uint8)
    for M, name in ((1, "decode_gemm"), (100, "prefill_gemm")):
        launches.clear()
        out = products.gemm(a[:M], a_s[:M], W, SF, None, None, (128, 128), torch.float16)
        ((kernel, codes_, scales, _, _, _, _, result, config, zeros, *_),) = launches
        assert kernel == name and codes_.data_ptr() == a.data_ptr() and result is out
        assert torch.equal(scales, a_s[:M])
        assert M == 1 or scales.stride() == (1, 112)  # columns of 16 bytes
        assert config.splits > 1
        if name == "decode_gemm":  # one for each tile, or for each warpgroup of one
            assert zeros == f"{640 // config.block_n} zeros"
        else:
            assert zeros == f"{2 * ceil_div(100, config.block_m) * 640 // config.block_n} zeros"


@pytest.fixture
def stream(monkeypatch):
    """A stand-in for CUDA's streams and captures: assign `number` and `capturing`."""
    state = type("State", (), {"number": 7, "capturing": False})()

    class Stream:
        def __init__(self, device):
            self.cuda_stream = state.number

        def synchronize(self):
            pass

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(counters, "_counters", {})
    return state


def test_counters_are_shared_by_launches_that_cannot_overlap(stream):
    w, other = codes(128, 128), codes(128, 128)
    first = counters.counters(w, 70)
    assert first.dtype == torch.int32 and len(first) == 128 and not first.any()
    assert counters.counters(w, 128) is first
    assert counters.counters(w, 129) is not first
    assert counters.counters(other, 70) is not first
    stream.number = 8
    assert counters.counters(w, 70) is not first


def test_captures_take_counters_made_before_them(stream):
    w = codes(128, 128)
    stream.capturing = True
    recorded = counters.counters(w, 70)
    assert counters.counters(w, 70) is not recorded  # belongs to the capture's memory
    stream.capturing = False
    eager = counters.counters(w, 70)
    stream.capturing = True
    captured = counters.counters(w, 70)
    assert captured is not eager and counters.counters(w, 70) is captured
    stream.number = 8
    assert counters.counters(w, 70) is captured
