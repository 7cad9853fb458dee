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
    assert results()[f"{K} {dtype}"] == "20 variants, 1 order"


def variants():
    """residual, normed, quantized, column-major scales, aligned rows; what stores anything."""
    for residual, normed, quantize, mn_major, aligned in product((False, True), repeat=5):
        if (normed or quantize) and (quantize or not mn_major):
            yield residual, normed, quantize, mn_major, aligned


def order(K, dtype, residual, normed, quantize, mn_major, aligned, gpu) -> str:
    """The layout of the values that are summed."""
    import triton
    from triton.compiler import ASTSource

    from vllm_ue8m0.kernels.config import FMA, rms_norm_quant_warps
    from vllm_ue8m0.kernels.rms_norm_quant import _rms_norm_quant_kernel as kernel

    constants = {
        "FLOOR": 105, "GROUP": 128, "GROUPS": triton.next_power_of_2(K // 128),
        "MN_MAJOR": mn_major, "PACKED": False, "HAS_RESIDUAL": residual, "HAS_NORMED": normed,
        "QUANTIZE": quantize, "PDL": True,
    }  # fmt: skip
    pointers = {"x": dtype, "weight": dtype}
    for used, names in (
        (residual, {"residual": dtype, "residual_out": dtype}), (normed, {"normed": dtype}),
        (quantize, {"q": "u8", "s": "u8"}),
    ):  # fmt: skip
        if used:
            pointers |= names
        else:
            constants |= dict.fromkeys(names)
    signature = {}
    for name in kernel.arg_names:
        number = "fp32" if name == "eps" else "i32"
        kind = f"*{pointers[name]}" if name in pointers else number
        signature[name] = "constexpr" if name in constants else kind
    places = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    multiples = [*pointers, "K", *(["stride_xm"] if aligned else [])]
    if not aligned:
        multiples.remove("x")
    attributes = {places[name]: [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature, {places[k]: v for k, v in constants.items()}, attributes)
    options = {**FMA, "num_warps": rms_norm_quant_warps(K), "launch_pdl": True}
    text = triton.compile(source, target=gpu, options=options).asm["ttgir"]
    reduced = text[text.index('"tt.reduce"') :]
    name = re.search(r"\}\) : \(tensor<[^>]*, #(\w+)>", reduced)[1]
    return re.search(rf"#{name} = (.*)", text)[1]


if __name__ == "__main__":
    gpu = target(90)
    for K, dtype in product(SIZES, DTYPES):
        orders = [order(K, dtype, *variant, gpu) for variant in variants()]
        print(f"{K} {dtype}: {len(orders)} variants, {len(set(orders))} order", flush=True)
