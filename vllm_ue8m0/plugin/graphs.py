"""What passes over a graph of torch.fx share: views, values, new nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

Node = Any  # of torch.fx, whose arguments are of all types that there are
VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def without_views(given: Node) -> tuple[Node, list[Node]]:
    """What a node is, and the views of that which led to it and change nothing."""
    views = []
    while given.target in VIEWS and shape_of(given) == shape_of(given.args[0]):
        views.append(given)
        given = given.args[0]
    return given, views


def is_there(operand: Any) -> bool:
    """Whether it comes before all computation: a weight, or no tensor."""
    return not isinstance(operand, fx.Node) or operand.op in ("placeholder", "get_attr")


def add_call(graph: fx.Graph, target: Any, arguments: tuple[Any, ...]) -> Node:
    """With the value that later passes ask for."""
    node = graph.call_function(target, arguments)
    node.meta["val"] = target(*fx.map_arg(arguments, value_of))
    return node


def value_of(node: Node) -> Any:
    return node.meta.get("val")


def shape_of(node: Node) -> Any:
    return value_of(node).shape
