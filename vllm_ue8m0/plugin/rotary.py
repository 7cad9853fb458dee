"""MLA's rotary embedding as one operator, in the graph that vLLM compiles.

Inductor generates a kernel for the keys and one for the queries, which copies all of them to write
a third: 17 us for 256 tokens of DeepSeek-V3.1 (H200, 2026-11-30). Here both come from an operator,
and nothing else reads them before they are rotated, so they are in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .. import reference
from . import compat, mla_cache
from .graphs import VIEWS, Node, add_call, is_there, shape_of, value_of

logger = compat.init_logger(f"vllm.{__name__}")
ROWS, POSITIONS = 3, 7  # of the trial


class _Rotation(NamedTuple):
    """heads: the queries [M, H, D] before; queries, keys: the results."""

    heads: Node
    queries: Node
    keys: Node
    positions: Node
    cos_sin: Node


def take(graph: fx.Graph, queries: Node, latent: Node, keys: Node, w: Node) -> None:
    """Rotate queries [M, H D] and, after them, keys [M, R], an operator's results, in place by one.

    The last R columns of each head, at neighbouring pairs of columns: known by what it computes.
    latent, w: what attention keeps beside the keys, and q_b_proj's weight; see mla_cache.py.
    """
    found = _find(graph, queries, keys)
    if found is None:
        return
    with graph.inserting_before(keys.next):
        heads = add_call(graph, found.heads.target, (queries, *found.heads.args[1:]))
        arguments = (heads, keys, found.positions, found.cos_sin, latent, w)
        add_call(graph, mla_cache.ROTARY, arguments)
        rotated = keys
        if shape_of(found.keys) != shape_of(keys):
            rotated = add_call(graph, torch.ops.aten.unsqueeze.default, (keys, 1))
    found.queries.replace_all_uses_with(heads)
    found.keys.replace_all_uses_with(rotated)
    # Here, not after all passes: Inductor's CPU code for stacked columns would be kept.
    before = _operands((found.queries, found.keys), (queries, keys))[0]
    for node in reversed([node for node in graph.nodes if node in before]):
        if not node.users:
            graph.erase_node(node)


def _find(graph: fx.Graph, queries: Node, keys: Node) -> _Rotation | None:
    views = [queries, *(user for user in queries.users if user.target in VIEWS)]
    results = [
        user for view in views for user in view.users
        if user.target is torch.ops.aten.slice_scatter.default and user.args[0] is view
    ]  # fmt: skip
    if len(results) != 1:
        return None
    (result,) = results
    heads = result.args[0]
    sizes = [node for node in heads.all_input_nodes if node is not queries]
    if value_of(heads).dim() != 3 or not all(map(is_there, sizes)):
        return None
    if not _only_for(queries, result):
        return None
    shapes = [shape_of(keys), (shape_of(keys)[0], 1, shape_of(keys)[1])]
    for other in _until(keys, result):
        if not isinstance(value_of(other), torch.Tensor) or shape_of(other) not in shapes:
            continue
        if other is keys or not _only_for(keys, other):
            continue
        found = _tables(queries, keys, heads, result, other)
        if found is not None and _is_rotation(graph, found, queries, keys):
            return found
    return None


def _until(base: Node, last: Node) -> list[Node]:
    """A node and all that is computed of it, but what is of `last`."""
    found, todo = dict.fromkeys([base]), [base]
    while todo:
        node = todo.pop()
        if node is not last:
            todo += [user for user in node.users if user not in found]
            found.update(dict.fromkeys(node.users))
    return list(found)


def _only_for(base: Node, last: Node) -> bool:
    """Whether a node is read for `last` alone, by functions without other effects."""
    nodes = _until(base, last)
    apart = all(node is last or (node.users and not node.is_impure()) for node in nodes)
    return last in nodes and apart


def _operands(results: tuple[Node, ...], bases: tuple[Node, ...]) -> tuple[set[Node], set[Node]]:
    """What computes the results, and what that begins with: bases, or the graph's inputs."""
    inner, leaves, todo = set[Node](), set[Node](), list(results)
    while todo:
        node = todo.pop()
        if node in bases or node.op != "call_function":
            leaves.add(node)
        elif node not in inner:
            inner.add(node)
            todo += node.all_input_nodes
    return inner, leaves


def _tables(queries: Node, keys: Node, heads: Node, result: Node, other: Node) -> _Rotation | None:
    """With the two tensors that both are computed of beside the bases, if there are no more."""
    _, leaves = _operands((result, other), (queries, keys))
    tensors = [n for n in leaves if isinstance(value_of(n), torch.Tensor)]
    tensors = [n for n in tensors if n not in (queries, keys)]
    if len(tensors) != 2 or not {queries, keys} <= leaves:
        return None
    positions, table = sorted(tensors, key=lambda node: value_of(node).dim())
    ids, cos_sin, x = value_of(positions), value_of(table), value_of(queries)
    fits = (
        ids.dim() == 1 and ids.dtype in (torch.int32, torch.int64)
        and ids.shape[0] == x.shape[0] and cos_sin.dim() == 2
        and cos_sin.dtype == x.dtype == value_of(keys).dtype
        and cos_sin.shape[1] == shape_of(keys)[1] and is_there(positions) and is_there(table)
    )  # fmt: skip
    return _Rotation(heads, result, other, positions, table) if fits else None


def _is_rotation(graph: fx.Graph, found: _Rotation, queries: Node, keys: Node) -> bool:
    """Whether random numbers become what the operator makes of them."""
    (_, H, D), R = shape_of(found.heads), shape_of(keys)[1]
    if not all(isinstance(size, int) for size in (H, D, R)) or R > D or R % 2:
        return False
    inner, leaves = _operands((found.queries, found.keys), (queries, keys))
    with unset_fake_temporarily():
        draw, dtype = torch.Generator().manual_seed(0), value_of(queries).dtype
        q, k, table = (
            torch.randn(*shape, generator=draw).to(dtype)
            for shape in ((ROWS, H * D), (ROWS, R), (POSITIONS, R))
        )
        ids = torch.randint(POSITIONS, (ROWS,), generator=draw).to(value_of(found.positions).dtype)
        values = {queries: q, keys: k, found.cos_sin: table, found.positions: ids}
        values |= dict.fromkeys(leaves - set(values), ROWS)  # the number of rows
        try:
            for node in filter(inner.__contains__, graph.nodes):
                arguments, options = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*arguments, **options)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            logger.debug("ue8m0: this rotary embedding is left: %s", error)
            return False
        wanted = q.view(ROWS, H, D).clone(), k.clone()
        reference.rotary_embedding(*wanted, ids, table)
        results = values[found.queries], values[found.keys].reshape(ROWS, R)
        # To the last bit: a factor near one, in the graph, would be lost else.
        return all(
            one.dtype == other.dtype and torch.equal(one, other)
            for one, other in zip(results, wanted, strict=True)
        )
