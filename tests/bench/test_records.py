"""Files of results: what is written is read back, and what is no record is refused by line."""

import json
from pathlib import Path

import pytest
from recorded import RECORDS, record

from vllm_ue8m0.bench import BenchError
from vllm_ue8m0.bench.records import KEYS, Record, describe_variant, read, write


def test_every_benchmark_has_the_same_keys():
    keys = {
        "bench", "M", "N", "K", "ours_us", "peers_us", "limit_us", "context_us", "num_bytes",
        "ours", "gpu", "versions", "date", "flops", "roof",
    }  # fmt: skip
    assert set(KEYS) == keys
    for written in RECORDS:
        assert set(json.loads(written.to_json())) == keys | set(written.variant)


def test_a_line_is_what_the_docs_show():
    expected = {
        "bench": "act_quant", "M": 1, "N": None, "K": 7168, "ours_us": 2.0,
        "peers_us": {"vllm": 4.0}, "limit_us": 1.0, "context_us": {"empty": 1.5},
        "num_bytes": 21560, "ours": "portable kernels/act_quant.py", "gpu": "Test GPU",
        "versions": RECORDS[0].versions, "date": "2026-11-22", "flops": None,
        "roof": None, "scale": "ue8m0",
        "layout": "row_major",
    }  # fmt: skip
    assert json.loads(RECORDS[0].to_json()) == expected


def test_files_round_trip(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    path.write_text("an older file\n")
    write(path, RECORDS)
    assert read(path) == RECORDS
    assert len(path.read_text().splitlines()) == len(RECORDS)
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_run_keeps_both_files(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    write(path, RECORDS[:1])

    def interrupted():
        yield RECORDS[1]
        assert read(f"{path}.partial") == RECORDS[1:2]  # before the next is measured
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, interrupted())
    assert read(path) == RECORDS[:1]
    assert read(f"{path}.partial") == RECORDS[1:2]


def changed(**values):
    line = json.loads(record().to_json()) | values
    return json.dumps({key: value for key, value in line.items() if value != "REMOVED"})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected a JSON object, found list"),
        (changed(limit_us="REMOVED", gpu="REMOVED"), "no 'limit_us', 'gpu'"),
        (changed(ours_us=0), "'ours_us' is 0; expected a positive number"),
        (changed(ours_us=float("nan")), "'ours_us' is nan"),
        (changed(ours_us=True), "'ours_us' is True"),
        (changed(M=0), "'M' is 0; expected a positive integer or null"),
        (changed(K=1.5), "'K' is 1.5"),
        (changed(peers_us={"vllm": "fast"}), "'peers_us' is"),
        (changed(context_us=[]), "'context_us' is []"),
        (changed(versions=None), "'versions' is None"),
        (changed(bench=None), "'bench' is None"),
        (changed(scale=None), "variant 'scale' is None"),
    ],
)
def test_what_is_no_record_is_refused_by_line(tmp_path: Path, line: str, words: str):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{record().to_json()}\n\n{line}\n")
    with pytest.raises(BenchError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: not a benchmark record: ")
    assert words in str(error.value)


def test_limit_may_be_missing():
    assert Record.from_json(changed(limit_us=None, num_bytes=None)).limit_us is None


def test_files_without_records_are_refused(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    path.write_text("\n")
    with pytest.raises(BenchError, match="no records in it"):
        read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BenchError, match="not a text file"):
        read(path)


def test_variants_for_people():
    variant = {"scale": "ue8m0", "layout": "mn_major", "dtype": "bf16", "residual": False}
    assert describe_variant(variant) == "ue8m0 mn_major"
    variant |= {"dtype": "fp16", "masked": True, "experts": 32}
    assert describe_variant(variant) == "ue8m0 mn_major fp16 masked experts=32"
