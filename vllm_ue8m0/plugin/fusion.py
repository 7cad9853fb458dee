"""What is before a linear layer and the layer as one operator, in the graph that vLLM compiles.

A norm, or silu(gate) * up, then quantizes where the product does not do it itself: a launch and a
pass over the activations less. vLLM's own passes for this have scales that are no powers of two,
and find nothing here, since a linear layer is one operator.

Only norms that would run on this project's kernel (norms.py) are taken, so that no bit changes.
silu(gate) * up is rounded as without a graph, which what Inductor generates for it is not.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .. import reference
from ..library import OPS
from . import compat, rotary
from .graphs import Node, add_call, is_there, shape_of, value_of, without_views
from .norms import NAME

logger = compat.init_logger(f"vllm.{__name__}")
SPLITS = (torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default)


def install() -> None:
    """Have the model that is being built compiled so, unless the user has a pass of their own.

    A release beyond the tested ones that takes no passes serves without, with a warning.
    """
    files = map(Path(__file__).with_name, ("fusion.py", "graphs.py", "rotary.py"))
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    try:
        if not compat.add_graph_pass(fuse, source):
            logger.info(
                "ue8m0: nothing is fused with linear layers, for the %s given", compat.GRAPH_PASS
            )
    except (ImportError, AttributeError, TypeError) as error:
        logger.warning("ue8m0: nothing is fused with linear layers: %s", error)


def fuse(graph: fx.Graph) -> None:
    """Take what linear layers read into them, before vLLM lowers its norms."""
    products = [node for node in graph.nodes if node.target is OPS.linear.default]
    count = sum(_take_norm(graph, node) or _take_silu_mul(graph, node) for node in products)
    for call in [node for node in graph.nodes if node.target is OPS.norm_linear.default]:
        _take_latent(graph, call)
    logger.debug("ue8m0: %d of %d linear layers take what is before them", count, len(products))


class _Norm(NamedTuple):
    """sums: what reads the sum with the residual out of it."""

    node: Node
    x: Node
    residual: Node
    weight: Node
    eps: float
    sums: list[Node]


def _take_norm(graph: fx.Graph, product: Node) -> bool:
    given, views = without_views(product.args[0])
    norm, operands = _norm_of(given), product.args[1:]
    if norm is None or not all(map(is_there, operands)):
        return False
    normed = any(len(node.users) > 1 for node in (given, *views))
    x, *more = _experts_sum(norm.x) or (norm.x,)
    arguments = (x, norm.weight, norm.eps, norm.residual, normed, *operands, *more)
    with graph.inserting_before(norm.node):
        call = add_call(graph, OPS.norm_linear.default, arguments)
        results = [
            add_call(graph, operator.getitem, (call, i)) for i in range(len(call.meta["val"]))
        ]
    product.replace_all_uses_with(results[0])
    for total in norm.sums:
        total.replace_all_uses_with(results[1])
    if normed:
        given.replace_all_uses_with(results[-1])
    # What nothing reads any more goes after all passes.
    return True


def _experts_sum(total: Node) -> tuple[Node, Node, float] | None:
    """Routed and shared experts' results and the routed ones' factor, of a node that only a norm
    reads and that is their sum in 16 bits.
    """
    total, views = without_views(total)
    added = total.target is torch.ops.aten.add.Tensor and not total.kwargs
    if not added or any(len(node.users) > 1 for node in (total, *views)):
        return None
    for routed, shared in (total.args, total.args[::-1]):
        if not isinstance(routed, fx.Node) or not isinstance(shared, fx.Node):
            continue
        scaled, _ = without_views(routed)
        if scaled.target is not torch.ops.aten.mul.Tensor or not isinstance(scaled.args[1], float):
            continue
        x, factor = scaled.args
        alike = all(
            shape_of(node) == shape_of(total) and value_of(node).dtype == value_of(total).dtype
            for node in (shared, x)
        )
        if alike and value_of(total).dtype in (torch.bfloat16, torch.float16):
            return x, shared, factor
    return None


def _take_latent(graph: fx.Graph, call: Node) -> None:
    """A norm_linear of columns, with what else is read of the rows: a norm, and the last columns.

    That is MLA's q_b_proj behind fused_qkv_a_proj. The two norms are one launch; and what rotates
    the keys comes after q_b_proj, which would else not start, and fetch weights, before its end.
    """
    x, weight, eps, residual, normed, *operands = call.args
    base, first, K = _columns(x)
    if residual is not None or normed or base is x or first != 0:
        return
    places = {node: _columns(node) for node in _columns_of(base)}
    beside = [
        (given, norm)
        for node, place in places.items() if place[:2] == (base, K)
        for user in node.users for given in (user, *user.users)
        if (norm := _norm_of(given)) is not None and norm.x is node
    ]  # fmt: skip
    if len(beside) != 1:
        return
    ((given, norm),) = beside
    L = places[norm.x][2]
    if norm.residual is not None or not (is_there(weight) and is_there(norm.weight)):
        return
    rest = base, K + L, shape_of(base)[-1] - K - L
    arguments = (base, weight, eps, norm.weight, norm.eps, *operands)
    following = base.next
    while is_there(following):  # where a graph is given the rows
        following = following.next
    with graph.inserting_before(following):
        both = add_call(graph, OPS.latent_linear.default, arguments)
        results = [add_call(graph, operator.getitem, (both, i)) for i in range(3)]
    for node in call.users:
        node.replace_all_uses_with(results[0])
    given.replace_all_uses_with(results[1])
    for node in (node for node, place in places.items() if place == rest):
        node.replace_all_uses_with(results[2])
    queries, latent, keys = results
    rotary.take(graph, queries, latent, keys, operands[0])


def _take_silu_mul(graph: fx.Graph, product: Node) -> bool:
    given, views = without_views(product.args[0])
    if any(len(node.users) > 1 for node in (given, *views)):
        return False
    gate_up = _gate_up_of(graph, given)
    if gate_up is None:
        return False
    with graph.inserting_before(product):
        call = add_call(graph, OPS.silu_mul_linear.default, (gate_up, *product.args[1:]))
    product.replace_all_uses_with(call)
    return True


def _gate_up_of(graph: fx.Graph, given: Node) -> Node:
    """The [M, 2 K] that a node [M, K] is silu_mul of, or None.

    Known by what it computes: torch's releases write it in different functions.
    """
    nodes, leaves, todo = set(), set(), [given]
    while todo:
        node = todo.pop()
        if _is_elementwise(node):
            nodes.add(node)
            todo += [before for before in node.all_input_nodes if before not in nodes]
        else:
            leaves.add(node)
    gate_up, columns = leaves.pop() if len(leaves) == 1 else None, shape_of(given)[-1]
    value = None if gate_up is None else value_of(gate_up)
    if not isinstance(value, torch.Tensor) or not isinstance(columns, int):
        return None
    if value.shape[1:] != (2 * columns,):
        return None
    with unset_fake_temporarily():
        draw = torch.Generator().manual_seed(0)
        values = {gate_up: 4 * torch.randn(2, 2 * columns, generator=draw).to(value.dtype)}
        for node in filter(nodes.__contains__, graph.nodes):
            arguments, options = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*arguments, **options)
        wanted, found = reference.silu_mul(values[gate_up]), values[given]
        alike = wanted.shape == found.shape and wanted.dtype == found.dtype
        return gate_up if alike and torch.allclose(wanted, found, 0.02, 0.001) else None


def _is_columns(node: Node) -> bool:
    """Whether it may be some columns of another node."""
    if node.target is operator.getitem:
        return node.args[0].target in SPLITS
    return node.target is torch.ops.aten.slice.Tensor


def _columns_of(base: Node) -> list[Node]:
    """Nodes that may be some columns of this one."""
    found: list[Node] = []
    todo = [base]
    while todo:
        users = todo.pop().users
        todo += [user for user in users if _is_columns(user) or user.target in SPLITS]
        found += filter(_is_columns, users)
    return found


def _columns(node: Node) -> tuple[Node, int, int]:
    """A node [M, width] as columns of another: that one, the first column, width.

    Of itself, if it is nothing else. Known by what it computes, as functions have defaults.
    """
    base, steps = node, []
    while (_is_columns(base) or base.target in SPLITS) and len(base.all_input_nodes) == 1:
        steps.append(base)
        base = base.args[0]
    rows, width = (*shape_of(node), 0)[:2]
    _, columns = (*shape_of(base), None)[:2]
    numbers = isinstance(width, int) and isinstance(columns, int)
    if steps and numbers and value_of(base).dim() == 2 and shape_of(base)[0] == rows:
        with unset_fake_temporarily():
            found: Any = torch.arange(columns).expand(2, -1)
            for step in reversed(steps):
                found = step.target(found, *step.args[1:], **step.kwargs)
            wanted = found[:1, :1] + torch.arange(width)
            if found.numel() and torch.equal(found, wanted.expand(2, -1)):
                return base, int(found[0, 0]), width
    return node, 0, width


def _is_elementwise(node: Node) -> bool:
    """Of constants and other nodes' values, or some columns of one."""
    cast = node.target is torch.ops.prims.convert_element_type.default
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return cast or pointwise or _is_columns(node) or node.target in SPLITS


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
        provided = compat.norm_provider(node.target, fx.map_arg(node.args, value_of))
        if provided == ("rms_norm", NAME) and node is given:
            x, weight, eps = node.args[:3]
            return _Norm(node, x, None, weight, eps, [])
        if provided != ("fused_add_rms_norm", NAME):
            return None
        x, residual, weight, eps = node.args[:4]
    others = [user for user in node.users if user is not given]
    apart = all(user.target is operator.getitem and user.args[1] == 1 for user in others)
    if node is given or not apart:
        return None  # its result is read twice, or whole
    return _Norm(node, x, residual, weight, eps, others)
