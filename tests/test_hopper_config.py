"""The rules that choose configurations of the sm_90 products, for every size a layer may have."""

import inspect

import pytest
import torch
from checks import aligned_codes as codes

from vllm_ue8m0 import portable, sm90
from vllm_ue8m0.bench.gemm import SHAPES
from vllm_ue8m0.kernels import hopper_config as rules
from vllm_ue8m0.layouts import ceil_div
from vllm_ue8m0.sm90 import counters, products

SMS = 132
pytestmark = pytest.mark.usefixtures("h100")
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
    assert chain(2048, 2048) is None


def test_one_token_takes_two_launches_unless_its_experts_fill_the_sms():
    from vllm_ue8m0.kernels.expert_config import experts_config

    def launches(inner, E=256, topk=8, sms=132):
        config = experts_config(1, topk, E, 256, 7168, inner, 1, False, sms)
        assert config.one_token is (config.chain is None) is (config.gated is not None)
        return 2 if config.one_token else 3

    assert launches(256) == launches(1024) == launches(2048, E=32) == 2
    assert launches(2048) == 3
    assert launches(2048, sms=160) == launches(2048, topk=7) == 2


def test_tall_tiles_take_the_place_of_more_than_a_wave():
    from vllm_ue8m0.kernels.expert_config import experts_config

    def tall(M, inner, E=256):
        config = experts_config(M, 8, E, 256, 7168, inner, 1, False, 132)
        return config.tall, config.least_tall

    assert tall(64, 2048) == (0, 0)  # no expert has more than four tiles
    assert tall(65, 2048) == (2, 9)
    assert tall(128, 2048, 32) == (2, 9)
    # 15 experts at most of more than two tiles, two units each.
    assert tall(65, 256) == (0, 0)
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
