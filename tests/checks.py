"""Comparisons and operands shared by the tests."""

import inspect

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

E4M3 = torch.float8_e4m3fn
# Of backend sm100, which runs in the interpreter too; Triton rewrites it for other GPUs.
BLOCK_SCALING = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 10,
    reason="block scaling needs a GPU of sm_100 or sm_103",
)


def backends(*modules, activations=()):
    """Parameters: every backend under its name, with these activation scales; sm100 with ue8m0."""
    found = []
    for module in modules:
        name = module.__name__.rpartition(".")[2]
        if name == "sm100":  # it hands the other activations to portable
            values = (module, "ue8m0") if activations else (module,)
            found.append(pytest.param(*values, marks=BLOCK_SCALING, id=name))
        elif activations:
            found += [pytest.param(module, scale, id=f"{name}-{scale}") for scale in activations]
        else:
            found.append(pytest.param(module, id=name))
    return found


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Equal shape, dtype and bits, any NaN equal to any other."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y = x.cpu(), y.cpu()
    if x.dtype.itemsize == 1:
        return torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    if not x.is_floating_point():
        return torch.equal(x, y)
    bits = torch.int16 if x.dtype.itemsize == 2 else torch.int32
    equal = (x.view(bits) == y.view(bits)) | (x.isnan() & y.isnan())
    return bool(equal.all())


def same_quantized(got, wanted) -> None:
    """Codes and scales, bit for bit."""
    assert same_bits(got[0], wanted[0]), "codes differ"
    assert same_bits(got[1], wanted[1]), "scales differ"


def calc_diff(x: np.ndarray, y: np.ndarray) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>), as DeepGEMM's tests measure it."""
    return float(1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()))


def assert_product(out: torch.Tensor, a: np.ndarray, w: np.ndarray, epilogue=None) -> None:
    """out against the float64 product of a [M, K] and w [N, K].

    2^-8 |ref| covers the rounding of a bf16 result. Hopper's fp8 accumulator keeps about 14 bits
    between float32 promotions: 2e-3 sum |a| |b| bounds that. `epilogue` (scale, offset), each
    broadcasting over [M, N], is applied to the product.
    """
    scale, offset = epilogue or (1.0, 0.0)
    ref = a @ w.T * scale + offset
    bound = np.abs(ref) * 2**-8 + np.abs(a) @ np.abs(w).T * np.abs(scale) * 2e-3
    got = out.to(torch.float64).cpu().numpy()
    assert got.shape == ref.shape
    assert np.isfinite(got).all()
    assert np.abs(ref).max() > 0  # a comparison of zeros would prove nothing
    assert calc_diff(got, ref) < 5e-6
    worst = (np.abs(got - ref) - bound).max()
    assert worst <= 0, f"{worst=}"


def random_codes(*shape: int, device: str) -> torch.Tensor:
    """e4m3 codes of a normal distribution that uses most of the range."""
    return (torch.randn(*shape, device=device) * 100).clamp(-448, 448).to(E4M3)


def random_scale(*shape: int, dtype: torch.dtype, device: str, spread: int = 4) -> torch.Tensor:
    """uint8 bytes within 2^+-spread, or float32 in about the same range."""
    exponent = torch.randint(-spread, spread + 1, shape, device=device)
    if dtype == torch.uint8:
        return (exponent + 127).to(torch.uint8)
    return torch.ldexp(torch.rand(*shape, device=device) + 0.5, exponent)


def integers(M, N, K, device, gran=(128, 128), a_dtype=torch.uint8, w_dtype=torch.uint8):
    """Small integers and scales 2^k: every partial sum is exact in any order."""
    a = torch.randint(-2, 3, (M, K), device=device).float().to(E4M3)
    w = torch.randint(-2, 3, (N, K), device=device).float().to(E4M3)
    groups = -(-K // gran[1])
    a_s = torch.randint(125, 130, (M, groups), device=device).to(torch.uint8)
    sf = torch.randint(125, 130, (-(-N // gran[0]), groups), device=device).to(torch.uint8)
    if a_dtype == torch.float32:
        a_s = torch.ldexp(torch.ones(a_s.shape, device=device), a_s.int() - 127)
    if w_dtype == torch.float32:
        sf = torch.ldexp(torch.ones(sf.shape, device=device), sf.int() - 127)
    return a, a_s, w, sf


def expert_operands(
    M, topk, device, E=4, H=192, inner=160, dtype=torch.bfloat16, gran=(128, 128),
    w_dtype=torch.uint8,
):  # fmt: skip
    """Arguments of experts up to gran2; topk different experts for each token."""

    def weight(N, K):
        grid = -(-N // gran[0]), -(-K // gran[1])
        sf = random_scale(E, *grid, dtype=w_dtype, device=device, spread=1)
        sf = sf - 8 if w_dtype == torch.uint8 else sf / 256
        return random_codes(E, N, K, device=device), sf

    w13, sf13 = weight(2 * inner, H)
    w2, sf2 = weight(H, inner)
    x = torch.randn(M, H, device=device).to(dtype)
    ids = torch.rand(M, E, device=device).argsort(1)[:, :topk].contiguous()
    return [x, w13, sf13, None, w2, sf2, None, torch.rand(M, topk, device=device), ids, gran, gran]


class NoSynchronization(TorchDispatchMode):
    """Refuses operators whose result or shape the host has to wait for."""

    BANNED = ("_local_scalar_dense", "nonzero", "unique", "bincount", "masked_select", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(banned in name for banned in self.BANNED), name
        index = args[1] if name.startswith("index") and len(args) > 1 else []
        assert not any(getattr(i, "dtype", None) == torch.bool for i in index or [])
        return func(*args, **(kwargs or {}))


def parameters(signature: inspect.Signature) -> list[tuple[object, ...]]:
    """Names, kinds and which have a default: what a caller needs to know."""
    return [(p.name, p.kind, p.default is not p.empty) for p in signature.parameters.values()]


def aligned_codes(rows, columns, pitch=None, offset=0):
    """Zeros e4m3 [rows, columns] on the CPU, `offset` bytes behind a multiple of 16."""
    pitch = pitch or columns
    memory = torch.zeros(offset + rows * pitch + 64, dtype=torch.uint8)
    offset += -memory.data_ptr() % 16
    memory = memory.view(E4M3)
    return memory.as_strided((rows, columns), (pitch, 1), offset)
