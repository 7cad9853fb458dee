"""The order of a norm's sum over K: by K and dtype alone, whatever the norm stores.

It is that of the layout that Triton gives to the values, which it chooses by what a kernel stores.
"""

import re
from functools import cache
from itertools import product

import pytest
from offline_compiler import report, target

pytest.importorskip("triton")

DTYPES = ("bf16", "fp16", "fp32")
SIZES = (512, 1536, 7168, 16384)


@cache
def results():
    return report(__file__)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", SIZES)
def test_one_order_for_all_variants(K, dtype):
    assert results()[f"{K} {dtype}"] == "40 variants, 1 order"


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("K", SIZES)
def test_two_norms_of_a_kernel_are_in_that_order(K, dtype):
    """The second one's values are fewer, in the same places: 8 a thread, as alone; then zeros."""
    assert results()[f"two of {K} {dtype}"] == "that order"


def variants():
    """residual, normed, quantized, column-major scales, aligned rows, shared; what stores."""
    for residual, normed, quantize, mn_major, *rest in product((False, True), repeat=6):
        if (normed or quantize) and (quantize or not mn_major):
            yield residual, normed, quantize, mn_major, *rest


def order(K, dtype, residual, normed, quantize, mn_major, aligned, shared, gpu) -> str:
    """The layout of the values that are summed."""
    import triton

    from vllm_ue8m0.kernels.rms_norm_quant import _rms_norm_quant_kernel as kernel

    constants = {
        "FLOOR": 105, "GROUP": 128, "GROUPS": triton.next_power_of_2(K // 128),
        "MN_MAJOR": mn_major, "PACKED": False, "HAS_RESIDUAL": residual, "HAS_NORMED": normed,
        "QUANTIZE": quantize, "HAS_SHARED": shared, "PDL": True,
    }  # fmt: skip
    pointers = {"x": dtype, "weight": dtype}
    for used, names in (
        (residual, {"residual": dtype, "residual_out": dtype}), (normed, {"normed": dtype}),
        (quantize, {"q": "u8", "s": "u8"}), (shared, {"shared": dtype}),
    ):  # fmt: skip
        if used:
            pointers |= names
        else:
            constants |= dict.fromkeys(names)
    (found,) = orders(kernel, K, constants, pointers, aligned, gpu)
    return found


def latent_orders(K, dtype, mn_major, aligned, gpu) -> list[str]:
    """Those of the kernel that has two norms."""
    import triton

    from vllm_ue8m0.kernels.rms_norm_quant import _latent_norm_quant_kernel as kernel

    constants = {
        "FLOOR": 105, "GROUP": 128, "GROUPS": triton.next_power_of_2(K // 128), "REST": 64,
        "MN_MAJOR": mn_major, "PDL": True,
    }  # fmt: skip
    pointers = dict.fromkeys(("x", "weight", "side_weight", "side", "rest"), dtype)
    pointers |= {"q": "u8", "s": "u8"}
    return orders(kernel, K, constants, pointers, aligned, gpu)


def orders(kernel, K, constants, pointers, aligned, gpu) -> list[str]:
    """The layout of the values of each sum."""
    import triton
    from triton.compiler import ASTSource

    from vllm_ue8m0.kernels.config import FMA, rms_norm_quant_warps

    signature = {}
    for name in kernel.arg_names:
        number = "fp32" if name.endswith("eps") or name == "factor" else "i32"
        kind = f"*{pointers[name]}" if name in pointers else number
        signature[name] = "constexpr" if name in constants else kind
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    multiples = [*pointers, "K", *(["stride_xm"] if aligned else [])]
    multiples += [name for name in kernel.arg_names if name in ("L", "R")]
    if not aligned:
        multiples.remove("x")
    attributes = {places[name]: [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature, {places[k]: v for k, v in constants.items()}, attributes)
    options = {**FMA, "num_warps": rms_norm_quant_warps(K), "launch_pdl": True}
    text = triton.compile(source, target=gpu, options=options).asm["ttgir"]
    names = [
        re.search(r"\}\) : \(tensor<([^>]*), #(\w+)>", part).groups()
        for part in text.split('"tt.reduce"')[1:]
    ]
    sums = [name for shape, name in names if shape.startswith("1x") and shape.endswith("xf32")]
    return [re.search(rf"#{name} = (.*)", text)[1] for name in sums]


if __name__ == "__main__":
    gpu = target(90)
    for K, dtype in product(SIZES, DTYPES):
        found = [order(K, dtype, *variant, gpu) for variant in variants()]
        print(f"{K} {dtype}: {len(found)} variants, {len(set(found))} order", flush=True)
        both = [latent_orders(K, dtype, *each, gpu) for each in product((False, True), repeat=2)]
        same = all(two == 2 * found[:1] for two in both)
        print(f"two of {K} {dtype}: {'that order' if same else both}", flush=True)
