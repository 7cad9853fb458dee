"""`bench gemm`: dense products at DeepSeek-V3's sizes beside DeepGEMM, CUTLASS, Triton, FlashInfer.

  prefill_gemm, middle_gemm    quantized a [M, K] times w [N, K]^T -> bf16, as single launches
  decode_gemm                  the same in a graph, over weights that are not in L2
  decode_linear                bf16 x in: quantization and product, in a graph likewise

Bytes are those of every operand, scale and result. Scales of ours are bytes ("ue8m0") or, for some
shapes, float32 that are no powers of two ("fp32"); peers get the same values in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import ModuleType

import torch

from .. import reference
from ..codec import scale_to_float
from ..formats import BLOCK
from ..layouts import to_layout
from . import GEMM_BENCHES, gate, gemm_peers
from .case import Case, Inputs, Outputs
from .operands import activations, block_scale_bytes, quantized_bytes, weight

Shape = tuple[int, int]
SHAPES: tuple[Shape, ...] = (  # N, K
    (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384),  # of attention
    (36864, 7168), (7168, 18432), (4096, 7168), (7168, 2048),  # of dense layers, shared experts
    (3072, 1536), (4096, 512), (4608, 7168), (7168, 2304), (512, 7168), (7168, 256),  # of TP 8
)  # fmt: skip
FP32_SHAPES: tuple[Shape, ...] = ((2112, 7168), (24576, 1536), (7168, 2048))
QUICK_SHAPE: Shape = (4096, 7168)
CUBE = 8192  # an extra M = N = K of prefill_gemm, where cuBLAS's best is known
ROWS = dict(
    zip(GEMM_BENCHES, ((512, 2048, 8192), (128, 256), (1, 16, 64), (1, 8, 16, 32)), strict=True)
)
GRAN = (BLOCK, BLOCK)


def cases(
    gemm_backend: ModuleType,
    linear_backend: ModuleType,
    only: Sequence[str] = (),
    quick: bool = False,
    shapes: Sequence[Shape] = (),
) -> list[Case]:
    """Every case of the benchmarks `only` (default: all); `quick`: a small and a large one each.

    shapes: (N, K), instead of those of DeepSeek-V3.
    """
    backends = (gemm_backend, linear_backend)
    selected = [case for case in _all(backends, shapes) if not only or case.bench in only]
    return [case for case in selected if case.quick or not quick]


def _all(backends: tuple[ModuleType, ModuleType], shapes: Sequence[Shape]) -> Iterator[Case]:
    quick_shape = shapes[0] if shapes else QUICK_SHAPE
    for bench, rows in ROWS.items():
        backend = backends[bench == "decode_linear"]
        make = linear if bench == "decode_linear" else partial(gemm, bench=bench)
        for shape in shapes or SHAPES:
            for scale in ("ue8m0", "fp32") if shape in FP32_SHAPES else ("ue8m0",):
                for M in rows:
                    quick = scale == "ue8m0" and shape == quick_shape and M in (rows[0], rows[-1])
                    yield make(backend, M=M, N=shape[0], K=shape[1], scale=scale, quick=quick)
        if bench == "prefill_gemm" and not shapes:
            yield make(backend, M=CUBE, N=CUBE, K=CUBE)


def describe(backend: ModuleType, op: str, M: int, N: int, K: int) -> str:
    """Which kernel runs a product and how it is launched, for the record."""
    if hasattr(backend, "describe"):
        return str(backend.describe(op, M, N, K))
    return backend.__name__.rpartition(".")[2]


def gemm(
    backend: ModuleType, bench: str, M: int, N: int, K: int, scale: str = "ue8m0",
    quick: bool = False,
) -> Case:  # fmt: skip
    """Quantized activations; their scales in the layout that the backend likes best, as peers'."""
    layout = getattr(backend, "GEMM_SCALE_LAYOUT", "row_major")
    prefill = bench == "prefill_gemm"

    def call(module: ModuleType, out_dtype: torch.dtype, t: Inputs) -> Outputs:
        return [module.gemm(t["a"], t["a_s"], t["w"], t["sf"], None, None, GRAN, out_dtype)]

    def inputs(generator: torch.Generator) -> Inputs:
        x = activations(generator, M, K)
        a, a_s = reference.act_quant(x, ue8m0=scale == "ue8m0")
        w, sf = weight(generator, N, K, scale)
        ours = {"a": a, "a_s": to_layout(a_s, layout), "w": w, "sf": sf, "w_s": scale_to_float(sf)}
        one = {"one": torch.ones((), device=x.device)} if prefill else {}
        return {**ours, **gemm_peers.activation_scales(a_s), **one}

    sample = gate.sample_rows((gate.rows_of(M),), ("a", "a_s"), ("product",))
    return Case(
        bench=bench,
        M=M,
        N=N,
        K=K,
        num_bytes=quantized_bytes(M, K, scale) + _weight_bytes(N, K, scale) + 2 * M * N,
        flops=2 * M * N * K,
        inputs=inputs,
        ours=partial(call, backend, torch.bfloat16),
        check=partial(gate.check_product, partial(call, reference, torch.float32), sample),
        agree=partial(gate.agree_product, sample, gate.SAME_PRODUCT),
        implementation=describe(backend, "gemm", M, N, K),
        variant={"scale": scale, "layout": layout},
        peers=gemm_peers.gemm(scale == "ue8m0"),
        context=gemm_peers.cublas() if prefill else {},
        single=bench in ("prefill_gemm", "middle_gemm"),
        quick=quick,
    )


def linear(
    backend: ModuleType, M: int, N: int, K: int, scale: str = "ue8m0", quick: bool = False
) -> Case:
    """bf16 activations, which ours and the peers quantize."""

    def call(inputs: Inputs) -> Outputs:
        return [backend.linear(inputs["x"], inputs["w"], inputs["sf"], None, None, GRAN, scale)]

    def expected(inputs: Inputs) -> Outputs:
        a, a_s = reference.act_quant(inputs["x"], ue8m0=scale == "ue8m0")
        w, sf = inputs["w"], inputs["sf"]
        return [reference.gemm(a, a_s, w, sf, None, None, GRAN, torch.float32)]

    def inputs(generator: torch.Generator) -> Inputs:
        w, sf = weight(generator, N, K, scale)
        return {"x": activations(generator, M, K), "w": w, "sf": sf, "w_s": scale_to_float(sf)}

    sample = gate.sample_rows((gate.rows_of(M),), ("x",), ("product",))
    return Case(
        bench="decode_linear",
        M=M,
        N=N,
        K=K,
        num_bytes=2 * M * K + _weight_bytes(N, K, scale) + 2 * M * N,
        flops=2 * M * N * K,
        inputs=inputs,
        ours=call,
        check=partial(gate.check_product, expected, sample),
        agree=partial(gate.agree_product, sample, gate.SAME_PRODUCT),
        agree_with={"flashinfer": partial(gate.agree_product, sample, gate.SAME_VALUES)},
        implementation=describe(backend, "linear", M, N, K),
        variant={"scale": scale, "dtype": "bf16"},
        peers=gemm_peers.linear(scale == "ue8m0"),
        quick=quick,
    )


def _weight_bytes(N: int, K: int, scale: str) -> int:
    return N * K + block_scale_bytes(N, K, scale)
