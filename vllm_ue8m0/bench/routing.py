"""Which experts tokens are routed to, and what share of the weights a layer then reads.

Every token gets `topk` different experts:
  uniform   each as likely as any other
  skewed    Zipf: expert e is drawn with a probability in proportion to 1 / (e + 1), without
            replacement. With 8 of 256, expert 0 gets 79 % of the tokens, 127 gets 1.2 %, 255 0.6 %
  single    the same experts for every token of a draw, another draw has others
"""

from __future__ import annotations

import torch

KINDS = ("uniform", "skewed", "single")


def draw(
    generator: torch.Generator, kind: str, tokens: int, experts: int, topk: int
) -> torch.Tensor:
    """Expert ids [tokens, topk] int32, as vLLM's routers give them on a GPU."""
    rows = 1 if kind == "single" else tokens
    # The largest of log p + Gumbel noise are a draw without replacement from p.
    noise = torch.empty(rows, experts, device=generator.device)
    keys = -noise.exponential_(generator=generator).log_()
    if kind == "skewed":
        keys -= torch.arange(1, experts + 1, device=generator.device).log()
    ids = keys.topk(topk, dim=-1).indices.to(torch.int32)
    return ids.expand(tokens, -1).contiguous()


def weights(generator: torch.Generator, tokens: int, topk: int) -> torch.Tensor:
    """Router weights [tokens, topk] float32, each token's of sum 1."""
    scores = torch.rand(tokens, topk, generator=generator, device=generator.device) + 0.1
    return scores / scores.sum(-1, keepdim=True)


def local_ids(ids: torch.Tensor, local: int) -> torch.Tensor:
    """Ids on a rank that holds the first `local` experts: -1 for the others'."""
    return torch.where(ids < local, ids, -1)


def expert_map(experts: int, local: int, device: torch.device) -> torch.Tensor:
    """The same as vLLM says it: [experts] int32, the local id of each, or -1."""
    return local_ids(torch.arange(experts, dtype=torch.int32, device=device), local)


def active(ids: torch.Tensor) -> tuple[int, int]:
    """Slots of local ids that have an expert here, and how many different experts those are."""
    routed = ids[ids >= 0]
    return routed.numel(), routed.unique().numel()
