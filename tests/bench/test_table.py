"""The printed table, its arithmetic and the summary, against figures worked out by hand."""

import pytest
from recorded import RECORDS, record

from vllm_ue8m0.bench import table


def test_rows():
    text = table.render(RECORDS)
    lines = text.splitlines()
    assert lines[0] == "act_quant"
    header = "variant M N/K ours us TB/s limit us limit/ours vllm us /ours (empty us)"
    assert " ".join(lines[1].split()) == header
    # 21,560 bytes in 2 us = 0.01 TB/s; 2.76 MB in 4 us = 0.69; 200 MB in 50 us = 4 TB/s
    rows = [line.split() for line in lines[2:5]]
    tail = ["1", "7168", "2.00", "0.01", "1.00", "50%", "4.00", "2.00", "1.50"]
    assert rows[0] == ["ue8m0", "row_major", *tail]
    tail = ["128", "7168", "4.00", "0.69", "3.00", "75%", "6.00", "1.50", "1.50"]
    assert rows[1] == ["ue8m0", "row_major", *tail]
    tail = ["8192", "7168", "50.00", "4.00", "40.00", "80%", "400.0", "8.00", "-"]
    assert rows[2] == ["ue8m0", "row_major", *tail]
    # without a peer: a block of its own
    header = "variant M N/K ours us TB/s limit us limit/ours"
    assert " ".join(lines[5].split()) == header
    assert " ".join(lines[6].split()) == "fp32 row_major 8192 7168 80.00 2.50 60.00 75%"
    weights = text.split("weight_quant\n")[1].splitlines()[1].split()
    assert weights == ["ue8m0", "-", "36864x7168", "100.0", "2.00", "99.00", "99%", "50.00", "0.50"]
    norms = " ".join(text.split("rms_norm_quant\n")[1].splitlines()[1].split())
    assert norms == "ue8m0 row_major residual experts=32 16 7168 3.00 - - -"


def test_columns_line_up():
    lines = table.render(RECORDS).splitlines()[1:5]
    end = lines[0].index("ours us") + len("ours us")
    for line in lines[1:]:
        assert line[end - 1].isdigit() and line[end] == " "


def test_summary():
    summary = table.summary(RECORDS).splitlines()[1:]
    # (2 * 1.5 * 8)^(1/3); of the two cases from 100 MB on, 40/50 and 60/80
    assert summary[0] == (
        "  act_quant: vllm 2.88 over 3; least share of the copy from 100 MB on 75% "
        "(M=8192 7168 fp32 row_major)"
    )
    assert summary[1] == (
        "  weight_quant: other 0.50 over 1; least share of the copy from 100 MB on 99% "
        "(36864x7168 ue8m0)"
    )
    assert summary[2] == "  rms_norm_quant: no peer, and nothing of 100 MB"


def test_geomean():
    assert table.geomean([2.0, 8.0]) == pytest.approx(4.0)
    assert table.geomean([0.5]) == pytest.approx(0.5)


def test_small_cases_do_not_count_for_the_share():
    assert "share" not in table.summary([record(num_bytes=99_999_999)])
    assert "share" in table.summary([record(num_bytes=100_000_000)])


def test_where_it_was_measured_is_said_once():
    text = table.render(RECORDS)
    assert text.endswith(
        "Test GPU, 2026-11-22: torch 2.11.0 triton 3.6.0 vllm - vllm_ue8m0 0.1.0 cuda 13.0 "
        "driver 580.1"
    )
    assert text.count("Test GPU") == 1
