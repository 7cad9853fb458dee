"""Counters of the parts of a sum over K that are done: zero before a launch and after it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from ..kernels.replay import lasting

_GRAPH = -1
_counters: dict[tuple[int, int, int], torch.Tensor] = {}


@lasting
def counters(w: torch.Tensor, count: int) -> torch.Tensor:
    """int32 zeros [>= count] for products with the weight w on the current stream.

    Launches that share counters must not overlap. Those of one weight on one stream do not, nor
    do those of captured graphs, which share a set per weight: a model runs one graph at a time.
    A capture takes zeros that were there before it; the first use of a weight, outside of one,
    makes them. Without, the capture records their clearing.
    """
    capturing = torch.cuda.is_current_stream_capturing()
    size = 1 << max(count - 1, 63).bit_length()
    stream = _GRAPH if capturing else torch.cuda.current_stream(w.device).cuda_stream
    key = (w.data_ptr(), size, stream)
    found = _counters.get(key)
    if found is None:
        if capturing:
            return torch.zeros(size, dtype=torch.int32, device=w.device)
        found, for_graphs = _lasting_zeros(size, w.device)
        _counters[key] = found
        _counters.setdefault((w.data_ptr(), size, _GRAPH), for_graphs)
    return found


def _lasting_zeros(size: int, device: torch.device) -> torch.Tensor:
    """Two sets [2, size], made in a thread of its own, whose allocations go to no memory pool.

    vLLM loads a model, and so warms it up, in a pool whose memory its sleep mode (level 2) gives
    back, and does not fill again: counters there would not be zero after waking.
    """

    def make() -> torch.Tensor:
        made = torch.zeros(2, size, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
