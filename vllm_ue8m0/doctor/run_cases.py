"""Run operators and hold them against plain torch, for `doctor`: `python -m ... OP:BACKEND ...`.

A program of its own, because a kernel may end the process, hang it, or leave the GPU unusable for
it; after an operator that raises, this one ends. Every line of stdout is a JSON object:

  {"operator", "backend", "case": text}      before each case
  {"operator", "backend", "cases": how many, "bitwise": whether all results are the reference's bit
   for bit, "diff": the largest calc_diff of a first result, "error": text or null, "no_memory":
   whether the error is that the GPU has too little}
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from .. import dispatch, reference
from ..agreement import bits, calc_diff, differs, form, rows_differ
from .cases import Case, cases


def main(pairs: list[str]) -> int:
    """Run the operators named as OPERATOR:BACKEND; the status is 1 if one raised."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for pair in pairs:
        operator, backend = pair.split(":")
        try:
            for line in check(operator, backend, device):
                _say(lines, operator, backend, line)
        except Exception as error:
            _say(lines, operator, backend, {
                "error": f"{type(error).__name__}: {_first_line(error)}",
                "no_memory": "out of memory" in str(error),
            })  # fmt: skip
            return 1
    return 0


def _say(lines: Any, operator: str, backend: str, line: dict[str, Any]) -> None:
    print(json.dumps({"operator": operator, "backend": backend, **line}), file=lines, flush=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def check(operator: str, backend: str, device: str) -> Iterator[dict[str, Any]]:
    """What is printed about an operator, without its name; raises what the operator does."""
    (module,) = (row.load() for row in dispatch.BACKENDS if row.name == backend)
    count, bitwise, diff, error = 0, True, 0.0, None
    for case in cases(operator):
        yield {"case": case.text}
        count += 1
        want = _results(reference, operator, case, "cpu")
        got = _results(module, operator, case, device)
        wrong = _wrong(case, want, got)
        if wrong is not None:
            error, bitwise = wrong, False
            break
        bitwise &= all(bool((bits(x) == bits(y)).all()) for x, y in zip(want, got, strict=True))
        diff = max(diff, float(calc_diff(*(t[0].flatten().float() for t in (want, got)))))
    yield {"cases": count, "bitwise": bitwise, "diff": diff, "error": error, "no_memory": False}


def _results(module: ModuleType, operator: str, case: Case, device: str) -> list[torch.Tensor]:
    """The results on the CPU; of experts' counted rows those that have a value."""

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    found = getattr(module, operator)(
        *map(there, case.arguments), **{name: there(v) for name, v in case.options.items()}
    )
    tensors = [found] if isinstance(found, torch.Tensor) else list(found)
    tensors = [tensor.cpu() for tensor in tensors]
    if case.counts is None:
        return tensors
    return [_counted(tensor, case.counts.tolist()) for tensor in tensors]


def _counted(tensor: torch.Tensor, counts: list[int]) -> torch.Tensor:
    rows = [tensor[expert, :count] for expert, count in enumerate(counts)]
    if tensor.dtype.itemsize > 1:
        return torch.cat(rows)
    return torch.cat([row.view(torch.uint8) for row in rows]).view(tensor.dtype)


def _wrong(case: Case, want: list[torch.Tensor], got: list[torch.Tensor]) -> str | None:
    if len(want) != len(got):
        return f"{len(got)} results instead of {len(want)}"
    for name, x, y in zip(case.names, want, got, strict=False):
        wrong = differs(name, x, y, case.tolerance)
        if wrong is not None:
            return wrong
    if case.names:
        return None
    (x,), (y,) = want, got
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"the product is {form(y)} instead of {form(x)}"
    if not case.by_row:
        x, y = x.reshape(1, -1), y.reshape(1, -1)
    return rows_differ(x, y, case.tolerance)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
