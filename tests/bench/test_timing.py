"""What timing decides without a GPU: how many buffers, and how rounds become one figure."""

import pytest

from vllm_ue8m0.bench.timing import plan_copies, summarize

L2, FREE = 50 << 20, 80 << 30


@pytest.mark.parametrize(
    ("num_bytes", "footprint", "copies", "calls"),
    [
        (21_560, 60_000, 100, 100),  # a decode case: as many as are allowed, each used once
        (1 << 20, 3 << 20, 100, 100),
        (3 << 20, 9 << 20, 50, 50),  # 3 x 50 MiB, exactly
        ((3 << 20) - 1, 9 << 20, 51, 51),
        (10 << 20, 30 << 20, 15, 20),  # fewer copies than calls: they rotate
        (700 << 20, 3 << 30, 4, 20),  # one call is beyond L2 already
        (700 << 20, 15 << 30, 2, 20),  # half of the memory holds 2.7
        (700 << 20, 60 << 30, 2, 20),  # never fewer than two
    ],
)
def test_copies(num_bytes: int, footprint: int, copies: int, calls: int):
    assert plan_copies(num_bytes, footprint, L2, FREE) == (copies, calls)


def test_a_case_may_want_more_copies():
    assert plan_copies(700 << 20, 1 << 20, L2, FREE, least=32) == (32, 32)
    assert plan_copies(3 << 20, 1 << 20, L2, FREE, least=32) == (50, 50)  # L2 wants as many
    assert plan_copies(700 << 20, 3 << 30, L2, FREE, least=32) == (13, 20)  # and memory allows


def test_summary():
    timing = summarize([float(t) for t in (*range(101, 111), *range(90, 100), 100)])  # 90 .. 110
    assert timing.time_us == 100
    assert timing.spread == pytest.approx(0.16)  # 108 - 92
    assert summarize([5.0]).time_us == 5 and summarize([5.0]).spread == 0


def test_an_outlier_does_not_move_the_median():
    timing = summarize([10.0] * 19 + [1000.0])
    assert timing.time_us == 10 and timing.spread == 0
