"""Interpolated n-gram model of bytes (Witten-Bell), the baseline of the tiny model.

P(c | h) = (n(hc) + T(h) P(c | h')) / (n(h) + T(h)), T(h) the number of different bytes seen after
h, h' = h without its first byte, down to the uniform distribution. Order 3 = context of 2 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


class NGram:
    def __init__(self, documents: Iterable[bytes], order: int = 3) -> None:
        """Counts take 256**order int32: order 3 is 64 MiB, order 4 would be 16 GiB."""
        self.counts = [torch.zeros(256**n, dtype=torch.int32) for n in range(1, order + 1)]
        for text in documents:
            data = _bytes(text)
            for n, count in enumerate(self.counts, 1):
                seen, times = _windows(data, n).unique(return_counts=True)
                count[seen] += times.to(torch.int32)

    def bits(self, text: bytes) -> float:
        """Total -log2 P of text, each byte given up to order - 1 bytes before it."""
        data = _bytes(text)
        p = torch.full((len(data),), 1 / 256, dtype=torch.float64)
        for n, count in enumerate(self.counts, 1):
            keys = _windows(data, n)  # the first n - 1 bytes have no history of this length
            rows = count.view(-1, 256)[keys // 256]
            total, kinds = rows.sum(-1).double(), (rows > 0).sum(-1).double()
            mixed = (count[keys].double() + kinds * p[n - 1 :]) / (total + kinds)
            p[n - 1 :] = torch.where(total > 0, mixed, p[n - 1 :])
        return float(-p.log2().sum())


def perplexity(model: NGram, documents: Iterable[bytes]) -> float:
    """Per byte, over whole documents."""
    bits = size = 0
    for text in documents:
        bits, size = bits + model.bits(text), size + len(text)
    return math.exp2(bits / size)


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def _windows(data: Tensor, n: int) -> Tensor:
    size = max(len(data) - n + 1, 0)
    keys = torch.zeros(size, dtype=torch.int64)
    for i in range(n):
        keys = keys * 256 + data[i : i + size]
    return keys
