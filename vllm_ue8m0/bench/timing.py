"""How time is taken: CUDA graphs over rotating cold buffers, candidates interleaved.

A candidate is a function of a buffer index. Its graph makes `calls` calls in a row, each on the
next of `copies` sets of buffers, which together exceed the L2 cache; so inputs come from memory
and outputs go there. Before each replay the L2 cache is flushed. A time is the median replay
divided by the calls: it holds no launch from Python, and the gap between kernels of one graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

import torch

Candidate = Callable[[int], object]

MIN_COPIES, MAX_COPIES, MIN_CALLS = 4, 100, 20
# Buffers of one rotation, in L2 sizes: the cache does not evict strictly by age.
ROTATION = 3
MEMORY_SHARE = 0.5
WARM_ROUNDS, ROUNDS = 2, 20


@dataclass(frozen=True)
class Timing:
    """Median microseconds of a call, and (p90 - p10) / median of the rounds."""

    time_us: float
    spread: float


def plan_copies(num_bytes: int, footprint: int, l2_bytes: int, free_bytes: int) -> tuple[int, int]:
    """How many copies of a case's buffers to rotate over, and how many calls a graph makes.

    num_bytes: moved by one call; footprint: memory that one more copy takes, of all candidates
    together. Of the limits memory is the hardest, but a rotation has at least two copies.
    """
    copies = max(MIN_COPIES, -(-ROTATION * l2_bytes // num_bytes))
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
        """Time candidates side by side; one that cannot be timed gives its error."""


class Graph:
    """`calls` calls of a candidate, rotating over `copies` buffers, replayed as one."""

    def __init__(self, call: Candidate, copies: int, calls: int) -> None:
        call(0)  # compiles, which nothing may inside a capture
        torch.cuda.synchronize()
        # Outputs live as long as a rotation: freed at once, the next call would get the same
        # memory, and its writes would stay in L2. What a call frees by itself (the tensor between
        # the two kernels of a pair) may be reused, as it is when serving.
        self._outputs: deque[object] = deque(maxlen=copies)
        self._graph = torch.cuda.CUDAGraph()
        self._calls = calls
        with torch.cuda.graph(self._graph):
            for i in range(calls):
                self._outputs.append(call(i % copies))

    def replay(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        return start, end

    def time_us(self, events: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        """Microseconds of one call of a finished replay."""
        return float(events[0].elapsed_time(events[1])) * 1e3 / self._calls


class CudaClock:
    """Times candidates on the current CUDA device."""

    def __init__(self) -> None:
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
        graphs: dict[str, Graph] = {}
        results: dict[str, Timing | Exception] = {}
        for name, call in candidates.items():
            try:
                graphs[name] = Graph(call, copies, calls)
            except Exception as error:
                results[name] = error
        replays = [
            (name, self._replay_cold(graph))
            for _ in range(WARM_ROUNDS + ROUNDS)
            for name, graph in graphs.items()
        ]
        torch.cuda.synchronize()
        for name, graph in graphs.items():
            times = [graph.time_us(events) for other, events in replays if other == name]
            results[name] = summarize(times[WARM_ROUNDS:])
        return results

    def _replay_cold(self, graph: Graph) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Replay after evicting from L2 what the last candidate left there.

        By reading: writing would leave dirty lines, and their way to memory would be charged to
        this candidate. The second pass keeps the GPU busy until the host has queued the replay.
        """
        self._cold.sum()
        self._cold.sum()
        return graph.replay()
