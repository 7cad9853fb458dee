"""Configurations of the sm_90 products: what fits, what tables hold, what is looked up."""

import json
from pathlib import Path

import pytest

from vllm_ue8m0.bench.gemm import SHAPES
from vllm_ue8m0.kernels import hopper_config as hopper
from vllm_ue8m0.layouts import ceil_div

SMS = 132
ODD_SHAPES = [(64, 128), (40, 384), (1000, 272), (512, 16384), (129280, 7168)]


@pytest.mark.parametrize(("N", "K"), [*SHAPES, *ODD_SHAPES])
@pytest.mark.parametrize("linear", [False, True], ids=["gemm", "linear"])
def test_decode_candidates_fit(N: int, K: int, linear: bool):
    NK = ceil_div(K, 128)
    for M in (1, 5, 8, 16, 20, 32, 64):
        for splits in hopper.splits_candidates(N, K, SMS):
            found = hopper.decode_candidates(M, N, K, splits, linear, SMS)
            assert found and len(set(found)) == len(found)
            for config in found:
                assert config.splits == splits and config.tokens == hopper.tokens(M)
                assert config.programs % splits == 0
                groups, tiles = config.programs // splits, ceil_div(N, config.block_n)
                assert 1 <= groups <= tiles and config.programs <= 2 * SMS
                assert 1 <= config.stages <= hopper.MAX_STAGES
                usual = hopper.default_decode(M, N, K, splits, config.fused, SMS)
                budget = hopper.HALF_SHARED_BYTES
                if config.programs <= SMS or config == usual:
                    budget = hopper.SHARED_BYTES  # alone on its SM
                assert config.stages <= hopper.decode_stages(config, NK, budget)
                assert config.stages <= ceil_div(tiles, groups) * ceil_div(NK, 2)
                assert not config.fused or (linear and M <= 32)
                assert config.block_n == 64 or (config.block_n == 128 and tiles * splits >= 90)


@pytest.mark.parametrize(("N", "K"), [*SHAPES, *ODD_SHAPES])
def test_parts_of_k_have_two_blocks(N: int, K: int):
    found = hopper.splits_candidates(N, K, SMS)
    assert found[0] == 1 and set(found) <= {1, 2, 4, 8, 16}
    assert all(splits == 1 or ceil_div(K, 128) / splits >= 2 for splits in found)
    assert hopper.default_splits(N, K, SMS) in found


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_candidates_hold_the_defaults(N: int, K: int):
    splits = hopper.default_splits(N, K, SMS)
    for M in (1, 8, 16, 32, 64):
        usual = hopper.default_decode(M, N, K, splits, False, SMS)
        assert usual in hopper.decode_candidates(M, N, K, splits, True, SMS)
    for M in (128, 8192):
        splits = hopper.prefill_splits(M, N, K, SMS)
        usual = hopper.default_prefill(M, N, K, splits, SMS)
        assert usual in list(hopper.prefill_candidates(M, N, K, splits))


def entry(rows: str, **config: object) -> dict[str, object]:
    return {rows: {"block_n": 64, "stages": 2, "programs": 66, **config}}


TABLE = {
    "gpu": "Test GPU",
    "shapes": {
        "2112,7168": {
            "decode": {
                "splits": 2,
                "gemm": {**entry("1", stages=7), **entry("16"), **entry("64", stages=3)},
                "linear": {**entry("1", fused=True), **entry("32", fused=False, stages=1)},
            },
            "prefill": {
                "128": {"block_m": 128, "block_n": 32, "stages": 10, "splits": 2},
                "2048": {"block_m": 256, "block_n": 128, "stages": 4, "splits": 1},
            },
        }
    },
}


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of tables for a GPU that is not there."""

    def clear():
        for cached in (hopper.table, hopper.decode_config, hopper.prefill_config):
            cached.cache_clear()

    monkeypatch.setattr(hopper, "TABLES", tmp_path)
    monkeypatch.setattr(hopper, "device_of", lambda index: ("Test GPU", SMS))
    clear()
    yield tmp_path
    clear()


def test_a_table_is_read(tables: Path):
    (tables / "Test_GPU.json").write_text(json.dumps(TABLE))
    decode = hopper.DecodeConfig
    for M, linear, wanted in (
        (1, False, decode(8, 64, 7, 2, 66)),
        (9, False, decode(16, 64, 2, 2, 66)),
        (33, False, decode(64, 64, 3, 2, 66)),
        (3, True, decode(8, 64, 2, 2, 66, True)),
        (17, True, decode(32, 64, 1, 2, 66)),
    ):
        assert hopper.decode_config(M, 2112, 7168, linear, False, 0) == wanted
    assert hopper.prefill_config(200, 2112, 7168, False, 0) == hopper.PrefillConfig(128, 32, 10, 2)
    # Above 256 rows K is not divided, whatever is nearest.
    assert hopper.prefill_config(300, 2112, 7168, False, 0).splits == 1
    assert hopper.prefill_config(1000, 2112, 7168, False, 0) == hopper.PrefillConfig(256, 128, 4)


def test_a_batch_invariant_run_has_no_parts(tables: Path):
    (tables / "Test_GPU.json").write_text(json.dumps(TABLE))
    assert hopper.decode_config(16, 2112, 7168, False, True, 0).splits == 1
    assert hopper.prefill_config(128, 2112, 7168, True, 0).splits == 1


def test_stages_that_do_not_fit_are_not_taken(tables: Path):
    table = json.loads(json.dumps(TABLE))
    table["shapes"]["2112,7168"]["decode"]["gemm"]["64"]["stages"] = 9
    (tables / "Test_GPU.json").write_text(json.dumps(table))
    found = hopper.decode_config(64, 2112, 7168, False, False, 0)
    assert found == hopper.default_decode(64, 2112, 7168, 2, False, SMS)  # of the same sum


def test_other_shapes_have_rules(tables: Path):
    (tables / "Test_GPU.json").write_text(json.dumps(TABLE))
    splits = hopper.default_splits(512, 7168, SMS)
    usual = hopper.default_decode(16, 512, 7168, splits, False, SMS)
    assert hopper.decode_config(16, 512, 7168, False, False, 0) == usual


@pytest.mark.parametrize("path", sorted(Path(hopper.__file__).parents[1].glob("tuned/*.json")),
                         ids=lambda path: path.stem)  # fmt: skip
def test_tables_that_come_with_the_package(path: Path, monkeypatch: pytest.MonkeyPatch):
    content = json.loads(path.read_text())
    assert hopper.table_path(content["gpu"]) == path
    for shape, found in content["shapes"].items():
        NK = ceil_div(int(shape.split(",")[1]), 128)
        decode, splits = found["decode"], found["decode"]["splits"]
        assert splits == 1 or 2 * splits <= NK
        for op in ("gemm", "linear"):
            for rows, config in decode[op].items():
                read = hopper.DecodeConfig(hopper.tokens(int(rows)), splits=splits, **config)
                assert read.programs % splits == 0
                room = hopper.decode_stages(read, NK, hopper.SHARED_BYTES)
                assert 1 <= read.stages <= room
        for config in found["prefill"].values():
            assert hopper.PrefillConfig(**config).splits >= 1
