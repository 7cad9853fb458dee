"""Which kernels the sm_90 products launch on what, without a GPU."""

import pytest
import torch
from checks import aligned_codes as codes

pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
from vllm_ue8m0 import reference
from vllm_ue8m0.kernels import hopper_config as rules
from vllm_ue8m0.layouts import ceil_div
from vllm_ue8m0.sm90 import products

pytestmark = pytest.mark.usefixtures("h100")


@pytest.fixture
def launches(monkeypatch):
    """The arguments of every launch, and of every act_quant, whose results are given."""
    a, a_s, seen = codes(100, 2048), torch.zeros(100, 16, dtype=torch.uint8), []

    def act_quant(x, group, ue8m0, layout):
        seen.append(("act_quant", x, group, ue8m0, layout))
        return a[: len(x)], a_s[: len(x)]

    monkeypatch.setattr(products.portable, "act_quant", act_quant)
    monkeypatch.setattr(products, "device_of", rules.device_of)
    monkeypatch.setattr(products, "counters", lambda w, count: f"{count} zeros")
    for name in ("decode_gemm", "prefill_gemm"):
        launch = lambda *arguments, name=name: seen.append((name, *arguments))  # noqa: E731
        monkeypatch.setattr(getattr(products, name), "launch", launch)
    return seen


W, SF = codes(640, 2048), torch.zeros(5, 16, dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["ue8m0", "fp32"])
def test_activations_are_quantized_inside_or_before(launches, kind):
    x, ue8m0 = torch.zeros(100, 2048), kind == "ue8m0"
    products.linear(x[:1], W, SF, None, None, (128, 128), kind)
    ((kernel, a, a_s, *_, config, _, how, floor),) = launches
    assert kernel == "decode_gemm" and a.dtype == torch.float32 and a_s is None
    assert config.fused and (how, floor) == (ue8m0, 105)
    for M, name in ((40, "decode_gemm"), (100, "prefill_gemm")):
        launches.clear()
        products.linear(x[:M], W, SF, None, None, (128, 128), kind)
        (quantizer, given, *rest), (kernel, a, a_s, *_) = launches
        assert (quantizer, len(given), rest) == ("act_quant", M, [128, ue8m0, "mn_major"])
        assert kernel == name and a.dtype == products.E4M3 and a_s.shape == (M, 16)


@pytest.mark.parametrize("kind", ["ue8m0", "fp32"])
@pytest.mark.parametrize(("added", "normed"), [(False, False), (True, False), (True, True)])
def test_what_is_before_a_product_quantizes(launches, monkeypatch, kind, added, normed):
    x, gate_up, weight = torch.ones(100, 2048), torch.ones(100, 4096), torch.ones(2048)
    product = (W, SF, None, None, (128, 128), kind)

    def noted(name):
        def operator(x, *args, shared=None, factor=1.0, **more):
            launches.append((name, more))
            x = x if shared is None else x * factor + shared
            return getattr(reference, name)(x, *args, **more)

        return operator

    for name in ("rms_norm_quant", "silu_mul_quant"):
        monkeypatch.setattr(products.portable, name, noted(name))
    for M, kernel in ((0, None), (1, "decode_gemm"), (40, "decode_gemm"), (100, "prefill_gemm")):
        norm = weight, 1e-6, x[:M] if added else None
        launches.clear()
        out, *rest = products.norm_linear(x[:M], *norm, normed, *product)
        wanted, *total = reference.add_rms_norm(x[:M], *norm)
        assert out.shape == (M, 640) and len(rest) == added + normed
        assert all(map(torch.equal, rest, total + [wanted] * normed))
        assert launches[0] == ("rms_norm_quant", {"layout": "mn_major", "normed": normed})
        if kernel is not None:
            name, a, a_s, *_ = launches[-1]
            assert name == kernel and a.dtype == products.E4M3 and a_s.shape == (M, 16)
        found = products.norm_linear(x[:M] * 2, *norm, normed, *product, -x[:M], 1.0)
        assert all(map(torch.equal, found[1:], rest))
        launches.clear()
        assert products.silu_mul_linear(gate_up[:M], *product).shape == (M, 640)
        assert launches[0] == ("silu_mul_quant", {"layout": "mn_major"})
        if kernel is not None:
            name, a, a_s, *_ = launches[-1]
            assert name == kernel and a.shape == (M, 2048) and a_s.shape == (M, 16)


@pytest.mark.parametrize("kind", ["ue8m0", "fp32"])
def test_the_first_of_two_norms_is_multiplied(launches, monkeypatch, kind):
    x, weight, side_weight = torch.randn(100, 2048 + 512 + 64), torch.rand(2048), torch.rand(512)

    def both(x, *arguments):
        launches.append(("both", *arguments))
        return [codes(len(x), 2048), torch.ones(16, len(x)).mT, "side", "rest"]

    monkeypatch.setattr(products, "latent_norm_quant", both)
    for M, kernel in ((1, "decode_gemm"), (40, "decode_gemm"), (100, "prefill_gemm")):
        launches.clear()
        norms = weight, 1e-6, side_weight, 1e-5
        out, *rest = products.latent_linear(x[:M], *norms, W, SF, None, None, (128, 128), kind)
        assert out.shape == (M, 640) and rest == ["side", "rest"]
        (_, *given), (name, a, a_s, *_) = launches
        assert given == [*norms, 128, kind == "ue8m0", "mn_major"]
        assert name == kernel and a.dtype == products.E4M3 and a_s.shape == (M, 16)


def test_codes_are_multiplied_as_they_are(launches):
    a, a_s = codes(100, 2048), torch.arange(1600).view(100, 16).to(torch.uint8)
    for M, name in ((1, "decode_gemm"), (100, "prefill_gemm")):
        launches.clear()
        out = products.gemm(a[:M], a_s[:M], W, SF, None, None, (128, 128), torch.float16)
        ((kernel, codes_, scales, _, _, _, _, result, config, zeros, *_),) = launches
        assert kernel == name and codes_.data_ptr() == a.data_ptr() and result is out
        assert torch.equal(scales, a_s[:M])
        assert M == 1 or scales.stride() == (1, 112)  # columns of 16 bytes
        assert config.splits > 1
        if name == "decode_gemm":  # one for each tile, or for each warpgroup of one
            assert zeros == f"{640 // config.block_n} zeros"
        else:
            assert zeros == f"{2 * ceil_div(100, config.block_m) * 640 // config.block_n} zeros"
