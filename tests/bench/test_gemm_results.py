"""Recorded products: their table, the summary's arithmetic, the picture."""

from pathlib import Path

import pytest
from recorded import PRODUCTS, RECORDS

from vllm_ue8m0.bench import plot, table
from vllm_ue8m0.bench.records import read, write


def test_rows_show_flops():
    lines = table.render(PRODUCTS).splitlines()
    header = "variant M N/K ours us TB/s TFLOPS limit us limit/ours"
    assert " ".join(lines[1].split()) == (
        f"{header} deepgemm us /ours cutlass us /ours (cublas us)"
    )
    # 2 * 512 * 256 * 512 flops in 10 us: 13.4 TFLOPS; 0.66 MB: 0.07 TB/s
    row = "ue8m0 row_major 512 256x512 10.00 0.07 13.4 5.00 50% 20.00 2.00 10.00 1.00 8.00"
    assert " ".join(lines[2].split()) == row
    assert "TFLOPS" not in table.render(RECORDS)


def test_summary():
    lines = table.summary(PRODUCTS).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "prefill_gemm ue8m0 row_major, cases: 2",
        # sqrt(2 * 0.5), sqrt(1 * 2); the fastest: 10 of 10 us, 10 of 20
        "deepgemm 1.000 over 2, least 0.500 (M=2048 256x512); M=512 2.000, M=2048 0.500",
        "cutlass 1.414 over 2, least 1.000 (M=512 256x512); M=512 1.000, M=2048 2.000",
        "the fastest of these 0.707 over 2, least 0.500 (M=2048 256x512); "
        "M=512 1.000, M=2048 0.500",
        "(cublas) 0.800 over 2, least 0.800 (M=512 256x512); M=512 0.800, M=2048 0.800",
        "limit 0.354 over 2, least 0.250 (M=2048 256x512); M=512 0.500, M=2048 0.250",
        "prefill_gemm fp32 row_major, cases: 1",
        "deepgemm 2.000 over 1",
        "the fastest of these 2.000 over 1",
        "limit 0.476 over 1",
        "prefill_gemm ue8m0 row_major 8192^3, cases: 1",
        "(cublas) 0.950 over 1",
        "limit 0.800 over 1",
        "prefill_gemm, ours with fp32 scales / with ue8m0",
        "1.050 over 1, most 1.050 (M=512 256x512)",
        "decode_linear ue8m0 row_major, cases: 1",
        "limit 0.500 over 1",
    ]


def test_products_and_quantizers_in_one_file(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    write(path, [*RECORDS, *PRODUCTS])
    records = read(path)
    assert records == [*RECORDS, *PRODUCTS]
    summary = table.summary(records)
    assert "  act_quant: vllm 2.88" in summary and "  prefill_gemm ue8m0" in summary


def test_roofline(tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "results.svg"
    plot.save(PRODUCTS, path)
    text = path.read_text()
    for words in ("prefill_gemm", "decode_linear", "flops per byte", "TFLOPS", "deepgemm",
                  "cublas (other work)", "3.00 TB/s, 1500 TFLOPS", "higher is better"):  # fmt: skip
        assert words in text, words
    assert plot.LIMIT not in text
    assert [draw for *_, draw in plot._panels(PRODUCTS[:4])] == [plot._draw_roofline]
    plot.save([*RECORDS, *PRODUCTS], path)
    assert "lower is better" in path.read_text()
