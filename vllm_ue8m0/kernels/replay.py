"""Operators that are run again without finding out again what they launch.

Most of what an operator costs the host is the same work every time: choosing kernels, making their
arguments, and finding out from them, in Triton, which compiled kernel they need. All of it follows
from the kinds of what the operator was given: dtypes, shapes, strides and alignment of tensors, and
the values of everything else. So `run` notes, once for each kind, the memory an operator allocates
and the compiled kernels it launches; after that both are done as they were, with the tensors of the
call. The layers of a step are alike, and so are steps of as many rows.

An operator that does anything else with tensors, as copying one, is run as it is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

P = ParamSpec("P")
# Kinds kept, about 10 KB each; the oldest go. Steps that prefill beside other requests have other
# rows every time: 60 numbers of rows are 800 kinds of DeepSeek-V3.1's operators.
MOST = 4096
ALIGNED = 16  # bytes: what Triton asks of addresses
_ALLOCATE = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
# Of most values, which therefore are not asked what else they may be.
_PLAIN = frozenset((int, bool, float, str, type(None), torch.dtype))
_kept: dict[Hashable, _Run | None] = {}
_switch = {"on": True}


class Launch:
    """What a launch function launches: kernel[grid](*args, **options)."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.kernel, self.grid, self.args, self.options = kernel, grid, args, options


@dataclass(frozen=True)
class Scratch:
    """An argument: so many float32 elements that no one reads afterwards."""

    size: int


@dataclass(frozen=True)
class _Kernel:
    """A compiled kernel, its arguments without tensors, and which of a run's tensors go where.

    pointers: (argument, tensor); descriptors: the same with a class and all its fields but base.
    """

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    pointers: list[tuple[int, int]] = field(default_factory=list)
    descriptors: list[tuple[int, int, type, dict[str, Any]]] = field(default_factory=list)

    def launch(self, tensors: Sequence[torch.Tensor]) -> None:
        arguments = self.arguments.copy()
        for place, index in self.pointers:
            arguments[place] = tensors[index]
        for place, index, kind, fields in self.descriptors:
            descriptor = object.__new__(kind)
            descriptor.__dict__.update(fields, base=tensors[index])
            arguments[place] = descriptor
        self.compiled[self.grid](*arguments)


@dataclass(frozen=True)
class _Run:
    """lasting: functions of one of the given tensors and a number; allocated: size, stride, dtype
    and device; result: tensors by number, of a list, a tuple, None or one.
    """

    lasting: list[tuple[Callable[[torch.Tensor, int], torch.Tensor], int, int]]
    allocated: list[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]]
    kernels: list[_Kernel]
    result: Any

    def __call__(self, given: list[torch.Tensor]) -> Any:
        tensors = given + [find(given[index], size) for find, index, size in self.lasting]
        for size, stride, dtype, device in self.allocated:
            tensors.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
        for kernel in self.kernels:
            kernel.launch(tensors)
        if isinstance(self.result, int):
            return tensors[self.result]
        return self.result and type(self.result)(tensors[index] for index in self.result)


class _Recorder(TorchDispatchMode):
    """What is allocated and launched inside, as a `_Run`, if nothing else is done with tensors."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        super().__init__()
        self.given, self.allocated = given, list[torch.Tensor]()
        self.lasting: list[tuple[Callable[..., torch.Tensor], int, int]] = []
        self.found: list[torch.Tensor] = []
        self.launches: list[tuple[Launch, Any]] = []
        self.plain = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATE:
            self.allocated.append(result)
        elif not func.is_view:
            self.plain = False
        return result

    def run(self, result: Any) -> _Run | None:
        if not self.plain or any(compiled is None for _, compiled in self.launches):
            return None  # Triton's interpreter gives None
        tensors = _Tensors([*self.given, *self.found, *self.allocated])
        kernels = [_kernel(what, compiled, tensors) for what, compiled in self.launches]
        several = isinstance(result, (list, tuple))
        wanted = result if several else [] if result is None else [result]
        numbers = [tensors.itself(tensor) for tensor in wanted]
        if None in kernels or None in numbers:
            return None
        made = [(t.shape, t.stride(), t.dtype, t.device) for t in self.allocated]
        given_back = type(result)(numbers) if several else numbers[0] if numbers else None
        return _Run(self.lasting, made, [k for k in kernels if k is not None], given_back)


class _Tensors:
    """Tensors of a run by number."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.all = tensors
        self.beginning: dict[int, list[int]] = {}
        for i, tensor in enumerate(tensors):
            self.beginning.setdefault(tensor.data_ptr(), []).append(i)

    def itself(self, tensor: torch.Tensor) -> int | None:
        """Of a tensor, which torch may have made another object of; None for others."""
        kind = tensor.dtype, tensor.shape, tensor.stride()
        found = self.beginning.get(tensor.data_ptr(), [])
        alike = [i for i in found if kind == (self.all[i].dtype, *_extent(self.all[i]))]
        return next((i for i in alike if self.all[i] is tensor), next(iter(alike), None))

    def number(self, tensor: torch.Tensor) -> int | None:
        """Of a tensor, or of what it is a view of from the first element on; None if unclear."""
        found = self.beginning.get(tensor.data_ptr(), [])
        itself = next((i for i in found if self.all[i] is tensor), None)
        one = len({id(self.all[i]) for i in found}) == 1 or tensor.data_ptr() == 0
        return itself if itself is not None else found[0] if found and one else None


_local = threading.local()


def launched(describe: Callable[P, Launch]) -> Callable[P, None]:
    """A function that launches what `describe` says."""

    @wraps(describe)
    def launch(*args: P.args, **kwargs: P.kwargs) -> None:
        what = describe(*args, **kwargs)
        given = [_tensor(value) for value in what.args]
        device = next(tensor.device for tensor in given if tensor is not None)
        what.args = tuple(
            torch.empty(value.size, dtype=torch.float32, device=device)
            if isinstance(value, Scratch) else value
            for value in what.args
        )  # fmt: skip
        compiled = what.kernel[what.grid](*what.args, **what.options)
        recorder = getattr(_local, "recorder", None)
        if recorder is not None:
            recorder.launches.append((what, compiled))

    return launch


def lasting(find: Callable[[torch.Tensor, int], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function whose tensors are there before and after an operator: asked in every run."""

    @wraps(find)
    def ask(of: torch.Tensor, size: int) -> torch.Tensor:
        recorder = getattr(_local, "recorder", None)
        if recorder is None:
            return find(of, size)
        _local.recorder = None
        with _disable_current_modes():
            found = find(of, size)
        _local.recorder = recorder
        index = next((i for i, given in enumerate(recorder.given) if given is of), None)
        if index is None:
            recorder.plain = False
        else:
            recorder.lasting.append((find, index, size))
            recorder.found.append(found)
        return found

    return ask


def run(operator: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """operator(*args, **kwargs), which depends on nothing else that changes in a process, but for
    vLLM's VLLM_BATCH_INVARIANT.
    """
    if not _switch["on"] or getattr(_local, "recorder", None) is not None:
        return operator(*args, **kwargs)
    given: list[torch.Tensor] = []
    kinds: list[Any] = [operator, os.environ.get("VLLM_BATCH_INVARIANT"), *kwargs]
    _append_kinds((*args, *kwargs.values()), kinds, given)
    kinds.append(given[0].get_device())
    if len(set(map(id, given))) < len(given):  # next time they may be two
        numbers = list(map(id, given))
        kinds.append(tuple(map(numbers.index, numbers)))
    key = tuple(kinds)
    if key in _kept:
        known = _kept[key]
        return operator(*args, **kwargs) if known is None else known(given)
    recorder = _local.recorder = _Recorder(given)
    try:
        with recorder:
            result = operator(*args, **kwargs)
    finally:
        _local.recorder = None
    if len(_kept) >= MOST:
        del _kept[next(iter(_kept))]
    _kept[key] = recorder.run(result)
    return result


@contextmanager
def off() -> Iterator[None]:
    """Every operator inside is run as it is, through Triton."""
    before = _switch["on"]
    _switch["on"] = False
    try:
        yield
    finally:
        _switch["on"] = before


def _append_kinds(values: Iterable[Any], kinds: list[Any], tensors: list[torch.Tensor]) -> None:
    """All that an operator and Triton can tell of the values, and the tensors among them."""
    for value in values:
        if type(value) in _PLAIN:
            kinds.append(value)
        elif isinstance(value, torch.Tensor):
            tensors.append(value)
            address = value.data_ptr() % ALIGNED
            kinds.append((value.dtype, value.shape, value.stride(), address))
        elif isinstance(value, (tuple, list)):
            kinds.append(len(value))
            _append_kinds(value, kinds, tensors)
        else:
            kinds.append(value)


def _extent(tensor: torch.Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    return tensor.shape, tensor.stride()


def _tensor(value: Any) -> torch.Tensor | None:
    """An argument's tensor: itself, or a descriptor's."""
    base = value.base if hasattr(value, "block_shape") else value
    return base if isinstance(base, torch.Tensor) else None


def _kernel(what: Launch, compiled: Any, tensors: _Tensors) -> _Kernel | None:
    """None where a tensor is not one of the run's, or may be either of two."""
    names = what.kernel.arg_names
    values = dict(zip(names, what.args, strict=False)) | what.options
    grid = (*what.grid, 1, 1)[:3]
    kernel = _Kernel(compiled, grid, [values[name] for name in names])
    for place, value in enumerate(kernel.arguments):
        tensor = _tensor(value)
        if tensor is None:
            continue
        number = tensors.number(tensor)
        if number is None:
            return None
        if tensor is value:
            kernel.pointers.append((place, number))
        else:
            fields = {**vars(value), "base": None}
            kernel.descriptors.append((place, number, type(value), fields))
        kernel.arguments[place] = None
    return kernel
