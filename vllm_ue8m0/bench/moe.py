"""`bench moe`: the routed experts of DeepSeek-V3.1 as a layer, beside what vLLM calls for them.

  moe_layer    bf16 x [M, hidden], router weights and ids -> bf16 [M, hidden], in a graph: both
               products, both quantizations, SiLU, and the weighted sum of a token's experts

A layer is that of one rank: of "TP1" all, of "TP8" an eighth of every expert, of "EP8" an eighth of
the experts. Its weights are drawn once. Every call of a rotation has tokens and a routing of its
own, so that calls in a row read different experts; at every size they read more than L2 holds.

Bytes are those of the experts that tokens are routed to, of x, of the routing and of the result.
EP8 gets the tokens of all ranks, at least one of them for an expert of its own; a slot whose expert
is elsewhere is no work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch

from .. import reference
from ..agreement import experts_diff
from ..codec import scale_to_float
from ..formats import BLOCK
from . import MOE_LAYERS, gate, moe_peers, routing
from .case import Case, Inputs, Outputs, Shared, Work
from .operands import activations, block_scale_bytes, expert_weights
from .timing import MIN_COPIES

BENCH = "moe_layer"
TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
SHARDED_TOKENS = (1, 8, 16, 32, 128, 512, 2048, 8192)
QUICK_TOKENS = (1, 2048)
# Up to these tokens a draw of experts is a small sample, and what it reads depends on it.
SMALL_TOKENS, SMALL_DRAWS = 128, 20
GRAN = (BLOCK, BLOCK)


@dataclass(frozen=True)
class Layer:
    """Routed experts as one rank has them: the first `local` of `experts`.

    intermediate: of the rank's part of an expert.
    """

    parallel: str
    experts: int
    local: int
    hidden: int
    intermediate: int
    topk: int

    def num_bytes(self, tokens: int, active: int) -> int:
        """Read and written if the tokens go to `active` different experts of this rank."""
        return active * self._expert_bytes() + tokens * (2 * 2 * self.hidden + 8 * self.topk)

    def flops(self, slots: int) -> int:
        """Of both products, if tokens go to an expert of this rank `slots` times."""
        return 2 * slots * 3 * self.intermediate * self.hidden

    def _expert_bytes(self) -> int:
        H, I = self.hidden, self.intermediate  # noqa: E741
        return sum(N * K + block_scale_bytes(N, K, "ue8m0") for N, K in ((2 * I, H), (H, I)))


DEEPSEEK = {
    "tp1": Layer("TP1", experts=256, local=256, hidden=7168, intermediate=2048, topk=8),
    "tp8": Layer("TP8", experts=256, local=256, hidden=7168, intermediate=256, topk=8),
    "ep8": Layer("EP8", experts=256, local=32, hidden=7168, intermediate=2048, topk=8),
}


def cases(
    backend: ModuleType,
    only: Sequence[str] = (),
    quick: bool = False,
    tokens: Sequence[int] = (),
) -> list[Case]:
    """Every case of the layers `only` (default: all); `quick`: a small and a large one each.

    tokens: of each layer, instead of the usual; all of them are quick then.
    """
    return [case for case in _all(backend, only, tokens) if case.quick or not quick]


def _all(backend: ModuleType, only: Sequence[str], tokens: Sequence[int]) -> Iterator[Case]:
    for name in MOE_LAYERS:  # those of the same weights follow one another
        layer, kind = name.split("_")
        if not only or name in only:
            for M in tokens or (TOKENS if layer == "tp1" else SHARDED_TOKENS):
                quick = bool(tokens) or M in QUICK_TOKENS
                yield experts(backend, DEEPSEEK[layer], kind, M, quick)


def experts(backend: ModuleType, layer: Layer, kind: str, tokens: int, quick: bool = False) -> Case:
    """A layer at `tokens` tokens, routed as `kind` of routing.py says."""

    def call(module: ModuleType, t: Inputs) -> Outputs:
        out = module.experts(
            t["x"], t["w13"], t["sf13"], None, t["w2"], t["sf2"], None, t["topk_weights"],
            t["topk_ids"], GRAN, GRAN, "ue8m0", False,
        )  # fmt: skip
        return [out]

    def inputs(generator: torch.Generator) -> Inputs:
        draw = partial(routing.draw, generator, kind, tokens, layer.experts, layer.topk)
        ids = draw()
        while not bool((ids < layer.local).any()):  # it would be nothing to time, or to check
            ids = draw()
        return {
            "x": activations(generator, tokens, layer.hidden),
            "topk_weights": routing.weights(generator, tokens, layer.topk),
            "topk_ids": routing.local_ids(ids, layer.local),
            "global_ids": ids,
        }

    def work(inputs: Inputs) -> Work:
        slots, active = routing.active(inputs["topk_ids"])
        return Work(layer.num_bytes(tokens, active), layer.flops(slots))

    sample = gate.sample_rows(
        (gate.rows_of(tokens),), ("x", "topk_weights", "topk_ids"), ("result",)
    )

    def check(inputs: Inputs, outputs: Outputs) -> str | None:
        allowed = experts_diff(sample.inputs(inputs)["topk_ids"], layer.intermediate)
        return gate.check_product(partial(call, reference), sample, inputs, outputs, allowed)

    local_topk = max(layer.topk * layer.local // layer.experts, 1)
    return Case(
        bench=BENCH,
        M=tokens,
        N=None,
        K=layer.hidden,
        num_bytes=layer.num_bytes(tokens, local_topk),
        flops=layer.flops(tokens * local_topk),
        work=work,
        shared=_weights(layer),
        min_copies=SMALL_DRAWS if tokens <= SMALL_TOKENS else MIN_COPIES,
        inputs=inputs,
        ours=partial(call, backend),
        check=check,
        agree=partial(gate.agree_product, sample, gate.SAME_VALUES),
        implementation=f"{backend.__name__.rpartition('.')[2]} experts",
        variant={
            "parallel": layer.parallel,
            "routing": kind,
            "experts": layer.local,
            "intermediate": layer.intermediate,
            "topk": layer.topk,
            "scale": "ue8m0",
        },
        peers=moe_peers.experts(),
        quick=quick,
    )


def _weights(layer: Layer) -> Shared:
    """Weights of the rank, the scales in float32 too, and what vLLM has for experts elsewhere."""
    E, H, I = layer.local, layer.hidden, layer.intermediate  # noqa: E741

    def draw(generator: torch.Generator) -> Inputs:
        w13, sf13 = expert_weights(generator, E, 2 * I, H)
        w2, sf2 = expert_weights(generator, E, H, I)
        ours = {"w13": w13, "sf13": sf13, "w2": w2, "sf2": sf2}
        peers = {"w13_s": scale_to_float(sf13), "w2_s": scale_to_float(sf2)}
        if layer.experts > E:
            peers["expert_map"] = routing.expert_map(layer.experts, E, generator.device)
        return {**ours, **peers}

    return Shared(f"{E} of {layer.experts} experts, {H} x {I}", draw)
