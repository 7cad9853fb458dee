"""Scale checks from headers: what is accepted, what is reported, and how long it takes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from tiny_checkpoints import write_headers_only

from vllm_ue8m0.checkpoint.check import check_local_checkpoint, check_scales
from vllm_ue8m0.checkpoint.shards import INDEX_NAME, CheckpointError, TensorInfo

Header = tuple[str, tuple[int, ...]]


def infos(**tensors: Header) -> dict[str, TensorInfo]:
    """Header entries; in the keyword, __ stands for a dot."""
    return {
        name.replace("__", "."): TensorInfo(dtype, shape, 0, 0, "x")
        for name, (dtype, shape) in tensors.items()
    }


WEIGHT = ("F8_E4M3", (576, 300))  # 5 x 3 blocks, both partial at the end


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "scale", "weight_scale"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E8M0", "U8"])
def test_good_scales(suffix: str, dtype: str) -> None:
    good = infos(a__weight=WEIGHT, norm__scale=("F32", (576,)), b__weight=("BF16", (8, 8)))
    good[f"a.{suffix}"] = TensorInfo(dtype, (5, 3), 0, 0, "x")
    assert check_scales(good) == []


BAD = {
    "a.weight is F8_E4M3 [576, 300] without a scale; expected one of a.weight_scale_inv, ": (
        infos(a__weight=WEIGHT)
    ),
    "a.scale is [4, 3]; a weight [576, 300] in 128x128 blocks needs [5, 3]. Truncated": infos(
        a__weight=WEIGHT, a__scale=("F32", (4, 3))
    ),
    "a.scale is [3, 5]; a weight [576, 300] in 128x128 blocks needs [5, 3]. It looks trans": infos(
        a__weight=WEIGHT, a__scale=("F32", (3, 5))
    ),
    "a.weight_scale is []; a weight [576, 300] in 128x128 blocks needs [5, 3]. It looks like": (
        infos(a__weight=WEIGHT, a__weight_scale=("F32", ()))
    ),
    "a.scale has dtype F16; allowed: F32, BF16, F8_E8M0, U8.": infos(
        a__weight=WEIGHT, a__scale=("F16", (5, 3))
    ),
    "a.weight_scale_inv has no weight: a.weight is not in the checkpoint.": infos(
        a__weight_scale_inv=("F32", (5, 3))
    ),
    "a.scale has no weight: a.weight is not in the checkpoint.": infos(
        a__scale=("F8_E8M0", (5, 3))
    ),
    "a.weight_scale_inv belongs to a.weight, which is BF16, not F8_E4M3": infos(
        a__weight=("BF16", (576, 300)), a__weight_scale_inv=("F32", (5, 3))
    ),
    "a.scale is a second scale of a.weight": infos(
        a__weight=WEIGHT, a__weight_scale_inv=("F32", (5, 3)), a__scale=("F32", (5, 3))
    ),
}


@pytest.mark.parametrize("text", BAD)
def test_bad_scales(text: str) -> None:
    problems = [f"{p.tensor} {p.problem}" for p in check_scales(BAD[text])]
    assert len(problems) == 1
    assert problems[0].startswith(text)


def test_ignored_layers_and_blocks() -> None:
    tensors = infos(a__b__weight=WEIGHT, ab__weight=WEIGHT, ab__scale=("U8", (18, 10)))
    assert [p.tensor for p in check_scales(tensors, ["a"], (32, 32))] == []
    assert [p.tensor for p in check_scales(tensors, ["a.b"])] == ["ab.scale"]
    # A prefix ends at a dot: "a" is not a prefix of "ab".
    assert [p.tensor for p in check_scales(tensors, ["a"])] == ["ab.scale"]


def write(path: Path, tensors: dict[str, Header]) -> None:
    sizes = {"F8_E4M3": 1, "F32": 4, "BF16": 2}
    write_headers_only(
        path,
        {n: (d, s, sizes[d] * s[0] * s[1]) for n, (d, s) in tensors.items()},
    )


def test_local_checkpoint_lists_five(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {f"{i}.weight": WEIGHT for i in range(8)})
    with pytest.raises(CheckpointError, match="8 problems with FP8 scales") as caught:
        check_local_checkpoint(str(tmp_path))
    lines = str(caught.value).splitlines()
    assert [line.split(" is ")[0].strip() for line in lines[1:6]] == [
        f"{i}.weight" for i in range(5)
    ]
    assert lines[6].strip() == "... and 3 more."


def test_local_checkpoint_honours_ignored_layers(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a.weight": WEIGHT})
    for key in ("ignored_layers", "modules_to_not_convert"):
        config = {"quantization_config": {key: ["a"]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        check_local_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"1 problem with"):
        check_local_checkpoint(tmp_path)


def test_nothing_local_is_silent(tmp_path: Path) -> None:
    check_local_checkpoint("deepseek-ai/DeepSeek-V3.1")
    (tmp_path / "config.json").write_text("{}")
    check_local_checkpoint(str(tmp_path))
    # Saved by vLLM per rank: the same names in each file.
    for rank in range(2):
        path = tmp_path / f"model-rank-{rank}-part-0.safetensors"
        write(path, {"a.weight": ("BF16", (2, 2))})
    check_local_checkpoint(str(tmp_path))


def test_index_without_any_shard_is_not_silent(tmp_path: Path) -> None:
    index = {"weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is missing"):
        check_local_checkpoint(tmp_path)


@pytest.mark.no_cover
def test_ninety_thousand_tensors_take_less_than_two_seconds(tmp_path: Path) -> None:
    weight_map = {}
    for shard in range(160):
        file = f"model-{shard:05}-of-00160.safetensors"
        tensors: dict[str, Header] = {}
        for i in range(282):
            name = f"model.layers.{shard}.mlp.experts.{i}.down_proj.weight"
            tensors |= {name: ("F8_E4M3", (7168, 2048)), f"{name}_scale_inv": ("F32", (56, 16))}
        write(tmp_path / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    seconds = []
    for _ in range(3):  # the least: other tests share the cores
        start = time.process_time()
        check_local_checkpoint(tmp_path)
        seconds.append(time.process_time() - start)
    assert len(weight_map) > 90_000
    assert min(seconds) < 2
