"""A clock that needs no GPU, and the machine it stands on.

Candidates are called all the same; where there is a GPU Triton needs tensors on it.
"""

import torch
from recorded import VERSIONS

from vllm_ue8m0.bench.machine import Machine
from vllm_ue8m0.bench.timing import Timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MACHINE = Machine("Test GPU", VERSIONS, "2026-11-22")
COPIES = ["copy torch", "copy triton 1024x4", "copy triton 4096x8", "copy triton 8192x8"]


class FakeClock:
    """Calls every candidate on the first and last buffer; times come from a table."""

    l2_bytes = 1 << 10

    def __init__(self, times=None, errors=None, spread=0.0):
        self.times, self.errors, self.spread = times or {}, errors or {}, spread
        self.seen = []

    def free_bytes(self):
        return 1 << 30

    def measure(self, candidates, copies, calls):
        self.seen.append((list(candidates), copies, calls))
        return self._call(candidates, (0, copies - 1))

    def measure_single(self, candidates):
        self.seen.append((list(candidates), "single"))
        return self._call(candidates, (0,))

    def _call(self, candidates, indices):
        results = {}
        for name, call in candidates.items():
            for i in indices:
                call(i)
            results[name] = self.errors.get(name) or Timing(self.times.get(name, 7.0), self.spread)
        return results
