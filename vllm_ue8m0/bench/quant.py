"""`bench quant`: the quantizers at DeepSeek-V3's sizes, bf16 in, beside vLLM's operators.

Bytes are those of the tensors that an operator has to read and write; of a masked operator, of its
valid rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch

from .. import reference
from ..agreement import INEXACT
from ..formats import BLOCK
from ..layouts import ceil_div
from . import gate, peers
from .case import Case, Inputs, Outputs
from .operands import activations, block_scale_bytes, quantized_bytes
from .records import Variant

HIDDEN = 7168
INTERMEDIATE = (2048, 18432)  # of an expert, of a dense layer
QKV_AND_MLP_INPUTS = (512, 1536, 2048, 16384, 18432)
WEIGHT = (36864, 7168)  # gate_up_proj of a dense layer
MASKED = (32, 1024)  # experts of one rank, rows for each
EPS = 1e-6
QUICK_M = (16, 8192)

Call = Callable[[ModuleType, Inputs], Outputs]


def cases(backend: ModuleType, only: Sequence[str] = (), quick: bool = False) -> list[Case]:
    """Every case of the operators `only` (default: all); `quick`: a small and a large one each."""
    selected = [case for case in _all(backend) if not only or case.bench in only]
    return [case for case in selected if case.quick or not quick]


def _all(backend: ModuleType) -> list[Case]:
    act = partial(act_quant, backend)
    silu = partial(silu_mul_quant, backend)
    rms = partial(rms_norm_quant, backend)
    small, large = QUICK_M
    variants = (("ue8m0", "mn_major"), ("ue8m0", "mn_major_packed"), ("fp32", "row_major"))
    expert, dense = INTERMEDIATE
    return [
        *(act(M, HIDDEN) for M in (1, 2, 4, 8, 16, 32, 64, 128, 1024, 8192, 32768)),
        *(act(M, HIDDEN, scale, layout) for M in (small, large) for scale, layout in variants),
        *(act(large, K) for K in QKV_AND_MLP_INPUTS),
        *(silu(M, width) for width in (expert, dense) for M in (1, 16, 128, 1024, 8192)),
        *(silu(large, width, "fp32") for width in (expert, dense)),
        masked_silu_mul_quant(backend, *MASKED, expert),
        *(
            rms(M, HIDDEN, scale)
            for scale in ("ue8m0", "fp32")
            for M in (1, 4, 16, 64, 128, 1024, 8192)
        ),
        *(rms(M, HIDDEN, residual=False) for M in (1, 8192)),
        *(weight_quant(backend, *WEIGHT, scale) for scale in ("ue8m0", "fp32")),
        *(weight_dequant(backend, *WEIGHT, scale) for scale in ("ue8m0", "fp32")),
    ]


def describe(backend: ModuleType, op: str, rows: int, K: int, variant: Variant) -> str:
    """Which kernel runs an operator and how it is launched, for the record."""
    if hasattr(backend, "describe_quant"):
        layout = str(variant.get("layout", "row_major"))
        masked = bool(variant.get("masked"))
        return str(backend.describe_quant(op, rows, K, variant["scale"] == "ue8m0", layout, masked))
    return backend.__name__.rpartition(".")[2]


def act_quant(
    backend: ModuleType, M: int, K: int, scale: str = "ue8m0", layout: str = "row_major"
) -> Case:
    ue8m0 = scale == "ue8m0"

    def call(module: ModuleType, inputs: Inputs) -> Outputs:
        return [*module.act_quant(inputs["x"], ue8m0=ue8m0, layout=layout)]

    return _case(
        backend,
        call,
        gate.sample_rows((gate.rows_of(M),), ("x",)),
        peers.act_quant(ue8m0, layout),
        bench="act_quant",
        M=M,
        K=K,
        variant={"scale": scale, "layout": layout, "dtype": "bf16"},
        num_bytes=M * K * 2 + quantized_bytes(M, K, scale, layout),
        inputs=lambda generator: {"x": activations(generator, M, K)},
        quick=M in QUICK_M and K == HIDDEN and (scale, layout) == ("ue8m0", "row_major"),
    )


def silu_mul_quant(backend: ModuleType, M: int, width: int, scale: str = "ue8m0") -> Case:
    ue8m0 = scale == "ue8m0"

    def call(module: ModuleType, inputs: Inputs) -> Outputs:
        return [*module.silu_mul_quant(inputs["gate_up"], ue8m0=ue8m0)]

    return _case(
        backend,
        call,
        gate.sample_rows((gate.rows_of(M),), ("gate_up",)),
        peers.silu_mul_quant(ue8m0),
        tolerance=INEXACT,
        bench="silu_mul_quant",
        M=M,
        K=width,
        variant={"scale": scale, "layout": "row_major", "dtype": "bf16"},
        num_bytes=M * width * 4 + quantized_bytes(M, width, scale),
        inputs=lambda generator: {"gate_up": activations(generator, M, 2 * width)},
        quick=M in QUICK_M and width == INTERMEDIATE[0] and ue8m0,
    )


def masked_silu_mul_quant(backend: ModuleType, experts: int, rows: int, width: int) -> Case:
    """MoE: expert e has counts[e] valid rows of `rows`, the same in every copy of the inputs."""
    counts = torch.randint(rows, (experts,), generator=torch.Generator().manual_seed(experts))
    counts = counts.to(torch.int32)
    layout, M = "mn_major_packed", int(counts.sum())

    def call(module: ModuleType, inputs: Inputs) -> Outputs:
        counts = inputs.get("counts")  # the reference gets the sampled rows alone, all valid
        return [*module.silu_mul_quant(inputs["gate_up"], ue8m0=True, layout=layout, counts=counts)]

    def inputs(generator: torch.Generator) -> Inputs:
        gate_up = activations(generator, experts, rows, 2 * width)
        return {"gate_up": gate_up, "counts": counts.to(generator.device)}

    valid = (torch.arange(rows) < counts[:, None]).nonzero()
    expert, row = valid[gate.rows_of(len(valid))].unbind(1)
    return _case(
        backend,
        call,
        gate.sample_rows((expert, row), ("gate_up",), drop=("counts",)),
        peers.masked_silu_mul_quant(),
        tolerance=INEXACT,
        bench="silu_mul_quant",
        M=M,
        K=width,
        variant={
            "scale": "ue8m0",
            "layout": layout,
            "dtype": "bf16",
            "masked": True,
            "experts": experts,
            "rows": rows,
        },
        num_bytes=M * width * 4 + quantized_bytes(M, width, "ue8m0", layout) + 4 * experts,
        inputs=inputs,
    )


def rms_norm_quant(
    backend: ModuleType, M: int, K: int, scale: str = "ue8m0", residual: bool = True
) -> Case:
    ue8m0 = scale == "ue8m0"

    def call(module: ModuleType, inputs: Inputs) -> Outputs:
        x, weight, added = inputs["x"], inputs["weight"], inputs.get("residual")
        return [*module.rms_norm_quant(x, weight, EPS, residual=added, ue8m0=ue8m0)]

    def inputs(generator: torch.Generator) -> Inputs:
        noise = torch.randn(K, generator=generator, device=generator.device)
        made = {
            "x": activations(generator, M, K),
            "weight": (1 + noise / 8).to(torch.bfloat16),
        }
        return {**made, "residual": activations(generator, M, K)} if residual else made

    results = ("codes", "scales", *(["residual"] if residual else []))
    return _case(
        backend,
        call,
        gate.sample_rows((gate.rows_of(M),), ("x", "residual"), results),
        peers.rms_norm_quant(ue8m0, EPS),
        tolerance=INEXACT,
        bench="rms_norm_quant",
        M=M,
        K=K,
        variant={"scale": scale, "layout": "row_major", "dtype": "bf16", "residual": residual},
        # x; residual in and out; weight
        num_bytes=M * K * (6 if residual else 2) + K * 2 + quantized_bytes(M, K, scale),
        inputs=inputs,
        quick=M in QUICK_M and ue8m0 and residual,
    )


def weight_quant(backend: ModuleType, N: int, K: int, scale: str) -> Case:
    ue8m0 = scale == "ue8m0"

    def call(module: ModuleType, inputs: Inputs) -> Outputs:
        # weight_quant waits for the device to refuse NaN, which cannot be captured.
        quantize = getattr(module, "weight_quant_unchecked", module.weight_quant)
        return [*quantize(inputs["w"], ue8m0)]

    return _case(
        backend,
        call,
        gate.sample_blocks(N, K),
        bench="weight_quant",
        N=N,
        K=K,
        variant={"scale": scale, "dtype": "bf16"},
        num_bytes=3 * N * K + block_scale_bytes(N, K, scale),
        inputs=lambda generator: {"w": activations(generator, N, K)},
        quick=ue8m0,
    )


def weight_dequant(backend: ModuleType, N: int, K: int, scale: str) -> Case:
    def call(module: ModuleType, inputs: Inputs) -> Outputs:
        return [module.weight_dequant(inputs["w"], inputs["sf"])]

    def inputs(generator: torch.Generator) -> Inputs:
        grid, device = (ceil_div(N, BLOCK), ceil_div(K, BLOCK)), generator.device
        values = torch.randn(N, K, dtype=torch.bfloat16, generator=generator, device=device) * 100
        sf = torch.randint(117, 127, grid, generator=generator, device=device).to(torch.uint8)
        if scale == "fp32":
            sf = torch.rand(grid, generator=generator, device=device) * 2.0**-7 + 2.0**-10
        return {"w": values.clamp_(-448, 448).to(torch.float8_e4m3fn), "sf": sf}

    return _case(
        backend,
        call,
        gate.sample_blocks(N, K, ("weights",)),
        bench="weight_dequant",
        N=N,
        K=K,
        variant={"scale": scale, "dtype": "bf16"},
        num_bytes=3 * N * K + block_scale_bytes(N, K, scale),
        inputs=inputs,
        quick=scale == "ue8m0",
    )


def _case(
    backend: ModuleType,
    call: Call,
    sample: gate.Sample,
    known: peers.Peers = ({}, {}),
    *,
    bench: str,
    K: int,
    M: int | None = None,
    N: int | None = None,
    tolerance: float = 0.0,
    variant: Variant,
    num_bytes: int,
    inputs: Callable[[torch.Generator], Inputs],
    quick: bool = False,
) -> Case:
    """A case of a backend's operator, `call(backend, inputs)`, checked against the reference's."""
    return Case(
        bench=bench,
        M=M,
        N=N,
        K=K,
        num_bytes=num_bytes,
        inputs=inputs,
        ours=partial(call, backend),
        check=partial(gate.check, partial(call, reference), sample, tolerance),
        agree=partial(gate.agree, sample),
        implementation=describe(backend, bench, M or N or 0, K, variant),
        variant=variant,
        peers=known[0],
        context=known[1],
        quick=quick,
    )
