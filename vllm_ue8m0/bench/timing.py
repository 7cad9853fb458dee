"""How time is taken: candidates interleaved, with a cold L2 cache, in graphs or one by one.

A candidate is a function of a buffer index. `measure`: its graph makes `calls` calls in a row,
each on the next of `copies` sets of buffers, which together exceed the L2 cache; so inputs come
from memory and outputs go there. Before each replay the L2 cache is flushed. A time is the median
replay divided by the calls: it holds no launch from Python, and the gap between kernels of one
graph.

`measure_single`: as in a prefill, each call is by itself, between two events, on the same buffers.
Before it the L2 cache is flushed COVER_READS times over: so long is the GPU busy while the host
queues the call, and what the host takes for a launch is in no time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Protocol

import torch

Candidate = Callable[[int], object]

MIN_COPIES, MAX_COPIES, MIN_CALLS = 4, 100, 20
# Buffers of one rotation, in L2 sizes: the cache does not evict strictly by age.
ROTATION = 3
MEMORY_SHARE = 0.5
WARM_ROUNDS, ROUNDS = 2, 20
# 1 ms on an H100. The host takes 10 us for each read, and 0.2 ms for a kernel with descriptors from
# Python: 10 reads, 2026-11-23, let single launches of 10 us be timed as 40.
COVER_READS = 30
Events = tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass(frozen=True)
class Timing:
    """Median microseconds of a call, and (p90 - p10) / median of the rounds."""

    time_us: float
    spread: float


def plan_copies(
    num_bytes: int, footprint: int, l2_bytes: int, free_bytes: int, least: int = MIN_COPIES
) -> tuple[int, int]:
    """How many copies of a case's buffers to rotate over, and how many calls a graph makes.

    num_bytes: moved by one call; footprint: memory that one more copy takes, of all candidates
    together. Of the limits memory is the hardest, but a rotation has at least two copies.
    """
    copies = max(least, -(-ROTATION * l2_bytes // num_bytes))
    affordable = int(free_bytes * MEMORY_SHARE) // footprint
    copies = max(2, min(copies, MAX_COPIES, affordable))
    return copies, max(copies, MIN_CALLS)


def summarize(times_us: list[float]) -> Timing:
    """The median, and how far the rounds lie apart."""
    middle = median(times_us)
    if len(times_us) < 2:
        return Timing(middle, 0.0)
    deciles = quantiles(times_us, n=10, method="inclusive")
    return Timing(middle, (deciles[-1] - deciles[0]) / middle)


class Clock(Protocol):
    """What times candidates; tests put one that needs no GPU in its place."""

    l2_bytes: int

    def free_bytes(self) -> int:
        """Memory that the buffers and outputs of a case may share."""

    def measure(
        self, candidates: Mapping[str, Candidate], copies: int, calls: int
    ) -> dict[str, Timing | Exception]:
        """Time candidates side by side in graphs; one that cannot be timed gives its error."""

    def measure_single(self, candidates: Mapping[str, Candidate]) -> dict[str, Timing | Exception]:
        """The same by single launches, all on the first buffer."""


class Graph:
    """`calls` calls of a candidate, rotating over `copies` buffers, replayed as one."""

    def __init__(self, call: Candidate, copies: int, calls: int) -> None:
        for i in range(copies):  # compiles, and makes what is kept by weight, before a capture
            call(i)
        torch.cuda.synchronize()
        # Outputs live as long as a rotation: freed at once, the next call would get the same
        # memory, and its writes would stay in L2. What a call frees by itself (the tensor between
        # the two kernels of a pair) may be reused, as it is when serving.
        self._outputs: deque[object] = deque(maxlen=copies)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(calls):
                self._outputs.append(call(i % copies))

    def replay(self) -> None:
        self._graph.replay()


class CudaClock:
    """Times candidates on the current CUDA device; rounds: replays or launches of each."""

    def __init__(self, rounds: int = ROUNDS) -> None:
        self._rounds = rounds
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.l2_bytes: int = properties.L2_cache_size
        self._cold = torch.zeros(2 * self.l2_bytes // 4, dtype=torch.float32, device="cuda")

    def free_bytes(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the last case held
        return int(torch.cuda.mem_get_info()[0])

    def measure(
        self, candidates: Mapping[str, Candidate], copies: int, calls: int
    ) -> dict[str, Timing | Exception]:
        graphs: dict[str, Callable[[], object]] = {}
        errors: dict[str, Exception] = {}
        for name, call in candidates.items():
            try:
                graphs[name] = Graph(call, copies, calls).replay
            except Exception as error:
                errors[name] = error
        # The second read keeps the GPU busy until the host has queued the replay.
        return {**errors, **self._in_turns(graphs, reads=2, calls=calls)}

    def measure_single(self, candidates: Mapping[str, Candidate]) -> dict[str, Timing | Exception]:
        launches: dict[str, Callable[[], object]] = {}
        errors: dict[str, Exception] = {}
        for name, call in candidates.items():
            try:
                call(0)  # compiles
                torch.cuda.synchronize()
                launches[name] = partial(call, 0)
            except Exception as error:
                errors[name] = error
        return {**errors, **self._in_turns(launches, reads=COVER_READS, calls=1)}

    def _in_turns(
        self, candidates: Mapping[str, Callable[[], object]], reads: int, calls: int
    ) -> dict[str, Timing]:
        """Median microseconds of each candidate, divided by the calls that one makes."""
        rounds = [
            (name, self._time_cold(once, reads))
            for _ in range(WARM_ROUNDS + self._rounds)
            for name, once in candidates.items()
        ]
        torch.cuda.synchronize()
        results = {}
        for name in candidates:
            pairs = [events for other, events in rounds if other == name]
            times = [float(start.elapsed_time(end)) * 1e3 / calls for start, end in pairs]
            results[name] = summarize(times[WARM_ROUNDS:])
        return results

    def _time_cold(self, once: Callable[[], object], reads: int) -> Events:
        """Run after evicting from L2 what the last candidate left there.

        By reading: writing would leave dirty lines, and their way to memory would be charged to
        this candidate.
        """
        for _ in range(reads):
            self._cold.sum()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        once()
        end.record()
        return start, end
