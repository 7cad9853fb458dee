"""What one measurement consists of; generic, so that every benchmark is run the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from .records import Variant, describe_variant
from .timing import MIN_COPIES

Inputs: TypeAlias = dict[str, torch.Tensor]
Outputs: TypeAlias = list[torch.Tensor]
Operator: TypeAlias = Callable[[Inputs], Outputs]
Agree: TypeAlias = Callable[[Outputs, Outputs], str | None]


@dataclass(frozen=True)
class Shared:
    """Inputs that are too large to be drawn for every copy, or for every case.

    Cases of an equal name in a row get the same tensors, which no copy rotates over and no peer
    may write to. The name also seeds the values, so that they do not depend on which cases ran.
    """

    name: str
    draw: Callable[[torch.Generator], Inputs]


@dataclass(frozen=True)
class Work:
    """What a call has to read and write, and to multiply and add; flops as in a case."""

    num_bytes: int
    flops: int | None


@dataclass(frozen=True)
class Case:
    """One shape and variant of one operator.

    num_bytes   what the operator has to read and write: inputs and outputs, scales included
    inputs      draws one copy of the inputs; called once per copy, each time with other values
    ours        the operator under test; it returns every tensor that it allocates for a result
    flops       of a product, whose limit is the roof's; None: the limit is a copy of num_bytes
    work        num_bytes and flops of a copy, where they depend on its values: the record has the
                mean of the calls, and those of the case are the least, which plans the rotation
    shared      inputs that operators get besides
    min_copies  copies to rotate over at the least, where one is no fair sample of the values
    single      timed as single launches, as in a prefill, not in a graph of calls
    peers       other implementations of the same work: name -> operator. One that raises when it
                is first called is absent, and the error is the reason. One may write to its
                inputs, which the others then read: values must stay finite, no time depends on them
    context     implementations of other work, worth knowing beside it
    check       (inputs, our outputs) -> what is wrong with them, or None
    agree       (our outputs, a peer's outputs) -> why that is not the same work, or None
    agree_with  by a peer's name: used instead of agree, where it rounds otherwise than ours
    implementation    which kernel and configuration ran, for the record
    variant     extra keys of the record: scale, layout, ...
    quick       in the selection of --quick
    """

    bench: str
    M: int | None
    N: int | None
    K: int | None
    num_bytes: int
    inputs: Callable[[torch.Generator], Inputs]
    ours: Operator
    check: Callable[[Inputs, Outputs], str | None]
    agree: Agree
    implementation: str
    variant: Variant
    peers: Mapping[str, Operator] = field(default_factory=dict)
    context: Mapping[str, Operator] = field(default_factory=dict)
    agree_with: Mapping[str, Agree] = field(default_factory=dict)
    flops: int | None = None
    work: Callable[[Inputs], Work] | None = None
    shared: Shared | None = None
    min_copies: int = MIN_COPIES
    single: bool = False
    quick: bool = False

    def __str__(self) -> str:
        sizes = [f"{name}={getattr(self, name)}" for name in "MNK" if getattr(self, name)]
        return " ".join([self.bench, *sizes, describe_variant(self.variant)])


def tensor_bytes(tensors: Mapping[str, torch.Tensor] | Outputs) -> int:
    """Memory that the elements of these tensors take."""
    values = tensors.values() if isinstance(tensors, Mapping) else tensors
    return sum(t.numel() * t.element_size() for t in values)
