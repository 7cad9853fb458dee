"""A norm and the linear layer behind it as one operator, in the graph that vLLM compiles.

Where the product does not quantize its input itself, the norm then does: a launch and a pass over
the activations less. vLLM's own pass for this has scales that are no powers of two, and finds
nothing here, since a linear layer is one operator.

Only norms that would run on this project's kernel (norms.py) are taken, so that no bit changes.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx

from ..library import OPS
from . import compat
from .norms import NAME

logger = compat.init_logger(f"vllm.{__name__}")
Node = Any  # of torch.fx, whose arguments are of all types that there are
VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def install() -> None:
    """Have the model that is being built compiled so, unless the user has a pass of their own."""
    source = Path(__file__).read_text(encoding="utf-8")
    if not compat.add_graph_pass(fuse, source):
        logger.info(
            "ue8m0: norms stay apart from linear layers, for the %s given", compat.GRAPH_PASS
        )


def fuse(graph: fx.Graph) -> None:
    """Take every norm that a linear layer reads into it, before vLLM lowers its norms."""
    products = [node for node in graph.nodes if node.target is OPS.linear.default]
    count = sum(_fuse(graph, product) for product in products)
    logger.debug("ue8m0: %d of %d linear layers take their norm", count, len(products))


class _Norm(NamedTuple):
    """sums: what reads the sum with the residual out of it."""

    node: Node
    x: Node
    residual: Node
    weight: Node
    eps: float
    sums: list[Node]


def _fuse(graph: fx.Graph, product: Node) -> bool:
    given, views = product.args[0], []
    while given.target in VIEWS and _shape(given) == _shape(given.args[0]):
        views.append(given)
        given = given.args[0]
    norm, operands = _norm_of(given), product.args[1:]
    if norm is None or not all(map(_is_there, operands)):
        return False
    normed = any(len(node.users) > 1 for node in (given, *views))
    arguments = (norm.x, norm.weight, norm.eps, norm.residual, normed, *operands)
    with graph.inserting_before(norm.node):
        call = _call(graph, OPS.norm_linear.default, arguments)
        results = [_call(graph, operator.getitem, (call, i)) for i in range(len(call.meta["val"]))]
    product.replace_all_uses_with(results[0])
    graph.erase_node(product)
    if norm.residual is not None:
        for node in [user for user in norm.node.users if user.args[1] == 1]:
            node.replace_all_uses_with(results[1])
            graph.erase_node(node)
    for node in views:
        if not node.users:
            graph.erase_node(node)
    given.replace_all_uses_with(results[-1])
    for node in dict.fromkeys((given, norm.node)):
        graph.erase_node(node)
    return True


def _norm_of(given: Node) -> _Norm | None:
    """The norm that a node is the result of, vLLM's or what it is lowered to, if it is ours."""
    node, residual = given, None
    if given.target is operator.getitem:
        node, index = given.args
        if index != 0:
            return None
    if node.kwargs:
        return None
    if node.target is OPS.add_rms_norm.default:
        x, weight, eps, residual = (*node.args, None)[:4]
    else:
        provided = compat.norm_provider(node.target, fx.map_arg(node.args, _value))
        if provided == ("rms_norm", NAME):
            x, weight, eps = node.args[:3]
        elif provided == ("fused_add_rms_norm", NAME):
            x, residual, weight, eps = node.args[:4]
        else:
            return None
    others = [] if node is given else [user for user in node.users if user is not given]
    if any(user.target is not operator.getitem or user.args[1] != 1 for user in others):
        return None  # its result is read twice, or whole
    return _Norm(node, x, residual, weight, eps, others)


def _is_there(operand: Any) -> bool:
    """Whether it comes before all computation: a weight, or no tensor."""
    return not isinstance(operand, fx.Node) or operand.op in ("placeholder", "get_attr")


def _call(graph: fx.Graph, target: Any, arguments: tuple[Any, ...]) -> Node:
    """With the value that later passes ask for."""
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*fx.map_arg(arguments, _value))
    return node


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _shape(node: Node) -> Any:
    return _value(node).shape
