"""How vLLM lays a checkpoint's linear layers out: which it fuses, and what tensor parallelism cuts.

Names are those of Llama-, Qwen- and DeepSeek-like models and DeepSeek's own (w1, w2, w3). A tensor
of another name is a layer of its own, and nothing is said about cutting it. The rules are those
of the quantization method (plugin/linear.py, plugin/moe.py), which needs vLLM to run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

from ..formats import BLOCK, MIN_GROUP_K
from ..layouts import common_gran, output_gran

TP_SIZES = (1, 2, 4, 8, 16, 32)
# Projection -> the layer that vLLM makes of it with its neighbors, in the layer's order of rows.
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), "gate_up_proj"),
    **dict.fromkeys(("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
}
_ORDER = {name: i for i, name in enumerate(_FUSED)}
_SPLIT_ROWS = ("q_b_proj", "kv_b_proj", "qkv_proj", "gate_up_proj")
_SPLIT_COLUMNS = ("o_proj", "down_proj", "w2")
_ATTENTION = ("q_b_proj", "kv_b_proj", "qkv_proj", "o_proj")
_PROJECTIONS = (*_FUSED, *_SPLIT_ROWS, *_SPLIT_COLUMNS)
# Models whose router vLLM makes a linear layer like the others (0.26 to 0.33, models/qwen3_moe.py):
# their checkpoints have to name it as not quantized.
_ROUTER = {"qwen3_moe": "gate"}
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(gate_proj|up_proj|down_proj|w[123])\.weight")
_IN_STACK = re.compile(r"(?:model\.|language_model\.)*layers\.(\d+)\..*\.(\w+)\.weight")

Grid = tuple[int, int] | str  # (rows, columns) per scale, or why this size is refused


class Layer(NamedTuple):
    """A module of vLLM's: its name, and how its weights are cut."""

    name: str
    kind: str  # "experts w13" | "experts w2" | a projection's name


def layer_of(weight: str) -> Layer:
    """The layer that a weight is loaded into, alone or with others."""
    expert = _EXPERT.fullmatch(weight)
    if expert is not None:
        part = "w2" if expert[2] in ("down_proj", "w2") else "w13"
        return Layer(f"{expert[1]}.{part}", f"experts {part}")
    parent, _, leaf = weight.removesuffix(".weight").rpartition(".")
    leaf = _FUSED.get(leaf, leaf)
    return Layer(f"{parent}.{leaf}" if parent else leaf, leaf)


def is_quantized_linear(weight: str, config: Mapping[str, Any]) -> bool:
    """Whether a model that is served quantized has a quantized linear layer of this name.

    Only names that leave no doubt count. Layers beyond num_hidden_layers (MTP) are not loaded with
    the model.
    """
    found = _IN_STACK.fullmatch(weight)
    layers = config.get("num_hidden_layers")
    if found is None or found[2] not in (*_PROJECTIONS, _ROUTER.get(config.get("model_type", ""))):
        return False
    return not (type(layers) is int and int(found[1]) >= layers)


def cuts(
    layer: Layer, members: Iterable[tuple[str, tuple[int, int]]], config: Mapping[str, Any]
) -> Mapping[int, Grid]:
    """Tensor-parallel size -> what becomes of the layer's scale grid, where it is not 128x128.

    members: name and shape of each weight, of one expert where there are many.
    """
    ordered = sorted(members, key=lambda m: _ORDER.get(m[0].split(".")[-2], 0))
    rows, columns = tuple(shape[0] for _, shape in ordered), ordered[0][1][1]
    heads = kv_heads = 0
    if layer.kind in _ATTENTION:
        heads = _number(config, "num_attention_heads")
        if layer.kind == "qkv_proj" and len(rows) == 3:
            kv_heads = _number(config, "num_key_value_heads") or heads
    return _cuts(layer.kind, rows, columns, heads, kv_heads)


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if type(value) is int and value > 0 else 0


@cache
def _cuts(
    kind: str, rows: tuple[int, ...], columns: int, heads: int, kv_heads: int
) -> Mapping[int, Grid]:
    grids: dict[int, Grid] = {}
    for size in TP_SIZES:
        if heads % size:
            grids[size] = f"refused: {heads} attention heads do not divide by {size}"
        else:
            grids[size] = _grid(kind, rows, columns, kv_heads, size)
    return {size: grid for size, grid in grids.items() if grid != (BLOCK, BLOCK)}


def _grid(kind: str, rows: tuple[int, ...], columns: int, kv_heads: int, tp_size: int) -> Grid:
    if kind in ("experts w13", "experts w2"):
        whole = rows[0] if kind == "experts w13" else columns
        if whole % tp_size:
            return f"refused: {whole} does not divide by {tp_size}"
        gran = common_gran([whole // tp_size])
        if tp_size > 1 and gran < MIN_GROUP_K:
            return _too_fine(gran)
        if kind == "experts w13":
            return gran, BLOCK
        return BLOCK, gran if tp_size > 1 else BLOCK
    if kind in _SPLIT_COLUMNS:
        if columns % tp_size:
            return f"refused: {columns} columns do not divide by {tp_size}"
        gran = BLOCK if tp_size == 1 else common_gran([columns // tp_size])
        return _too_fine(gran) if gran < MIN_GROUP_K else (BLOCK, gran)
    if kind not in _SPLIT_ROWS:
        return output_gran(list(rows), sum(rows)), BLOCK  # every rank has all of it
    sizes = []
    for i, size in enumerate(rows):
        # vLLM repeats key and value heads where there are fewer of them than ranks.
        parts = min(tp_size, kv_heads) if kv_heads and i else tp_size
        if size % parts:
            return f"refused: {size} rows do not divide by {parts}"
        sizes.append(size // parts)
    return output_gran(sizes, sum(sizes) * tp_size), BLOCK


def _too_fine(gran: int) -> str:
    return f"refused: groups of {gran} columns, at least {MIN_GROUP_K} are needed"
