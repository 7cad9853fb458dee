"""The trained fixture and the torch model that is its ground truth (docs/tiny_deepseek.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_deepseek import quant
from tiny_deepseek.checkpoint import BOS, CONFIG, export, read_weights, tokenizer_json
from tiny_deepseek.evaluate import WINDOW, evaluate, kl_divergence, windows
from tiny_deepseek.model import Context, QuantLinear, Rounding, TinyDeepseek
from tiny_deepseek.ngram import NGram

from vllm_ue8m0 import reference
from vllm_ue8m0.codec import ScaleClass, exact_ue8m0
from vllm_ue8m0.formats import QuantSpec
from vllm_ue8m0.layouts import grid_shape

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "tiny_deepseek"
MAX_BYTES = 5 << 20
# Interpolated 3-gram model of the same training text, on heldout.txt: docs/tiny_deepseek.md.
TRIGRAM_PERPLEXITY = 6.52
WINDOWS = 5  # of the 40 in heldout.txt, of five documents: seconds instead of minutes


@pytest.fixture(scope="module")
def model():
    return TinyDeepseek.from_checkpoint(FOLDER)


@pytest.fixture(scope="module")
def tokens():
    every = windows((FIXTURES / "heldout.txt").read_bytes())
    return every[:: len(every) // WINDOWS]


@pytest.fixture(scope="module")
def report(model, tokens):
    return evaluate(model, tokens)


def logits(model, tokens, **options):
    with torch.no_grad():
        return torch.cat([model(part, **options)[0] for part in tokens.split(4)])[:, :-1]


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def test_bf16_rounding_is_torch_s():
    x = torch.randn(1 << 16) * torch.logspace(-36, 36, 1 << 16)
    assert same_bits(quant.bf16(x), x.to(torch.bfloat16).to(torch.float32))


def test_e4m3_rounding_is_torch_s_for_every_bf16():
    x = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() <= 448]
    assert len(x) > 33_000
    assert same_bits(quant.round_e4m3(x), x.to(torch.float8_e4m3fn).to(torch.float32))


def test_act_quantization_is_the_reference_s():
    x = torch.randn(64, 512) * torch.logspace(-9, 4, 512)
    x = torch.cat((x, torch.zeros(1, 512), -x)).to(torch.bfloat16).float()
    assert same_bits(quant.fake_quant_act(x), reference.fake_quant(x, 128, "ue8m0"))


@pytest.mark.parametrize("shape", [(128, 128), (576, 256), (200, 300)])
def test_weight_quantization_is_the_reference_s(shape):
    w = torch.randn(3, *shape) * torch.logspace(-5, 2, shape[1])
    w[1, :128, :128] = 0.0
    expected = [reference.dequantize(*reference.weight_quant(part), (128, 128)) for part in w]
    assert same_bits(quant.fake_quant_weight(w), torch.stack(expected))


@torch.no_grad()
def test_export_stores_the_weights_of_the_training_forward(tmp_path):
    model = TinyDeepseek(CONFIG)
    assert export(model, tmp_path) <= MAX_BYTES
    stored = read_weights(tmp_path)
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert same_bits(module.values(), stored[f"{name}.weight"]), name


def test_gradients_pass_straight_through():
    w = torch.randn(256, 256, requires_grad=True)
    layer = QuantLinear(256, 256)
    layer.weight = torch.nn.Parameter(w.detach())
    x = torch.randn(4, 256)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(256, -1))


def test_fixture_is_a_ue8m0_checkpoint_within_its_size():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= MAX_BYTES
    config = json.loads((FOLDER / "config.json").read_text())
    assert QuantSpec.from_hf_config(config["quantization_config"]).scale_fmt == "ue8m0"
    assert json.loads((FOLDER / "tokenizer.json").read_text()) == tokenizer_json()
    tensors = load_file(FOLDER / "model.safetensors")
    quantized = [n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn]
    # 5 of attention in 3 layers, 3 of the dense MLP, 3 in each of 9 experts in 2 layers
    assert len(quantized) == 15 + 3 + 54
    for name in quantized:
        scale = tensors[f"{name}_scale_inv"]
        assert scale.shape == grid_shape(*tensors[name].shape, (128, 128)), name
        assert exact_ue8m0(scale).kind is ScaleClass.POW2, name


def test_tokens_are_bytes():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    text = bytes(range(1, 128)).decode() + "żółw — 龜 🐢"
    assert tokenizer.encode(text).ids == [BOS, *text.encode()]
    assert tokenizer.decode(list(text.encode())) == text


def test_experts_are_those_of_the_reference(model):
    """All experts weighted with 0 or the routing weight = only the selected ones."""
    moe, tensors = model.model.layers[1].mlp, load_file(FOLDER / "model.safetensors")
    x = torch.randn(64, CONFIG["hidden_size"]).to(torch.bfloat16)
    weights = moe.gate(x.float())
    topk_weights, ids = weights.topk(CONFIG["num_experts_per_tok"])

    def stack(name, suffix):
        prefix = "model.layers.1.mlp.experts"
        parts = [tensors[f"{prefix}.{e}.{name}.{suffix}"] for e in range(weights.shape[-1])]
        return torch.stack(parts)

    weight, scale = "weight", "weight_scale_inv"
    expected = reference.experts(
        x,
        torch.cat((stack("gate_proj", weight), stack("up_proj", weight)), 1),
        torch.cat((stack("gate_proj", scale), stack("up_proj", scale)), 1),
        None, stack("down_proj", weight), stack("down_proj", scale), None,
        topk_weights, ids, (128, 128), (128, 128), "ue8m0", False,
    )  # fmt: skip
    act = quant.activation_quantizer("ue8m0")
    context = Context(act, model.cos, model.sin, Rounding())
    ours = moe.routed(x.float(), weights, context)
    # the sums of float32 products may differ in order, which a bf16 rounding can make visible
    assert (ours == expected.float()).float().mean() > 0.99
    torch.testing.assert_close(ours, expected.float(), rtol=2**-7, atol=1e-3)


@torch.no_grad()
def test_no_logit_sees_later_tokens(model, tokens):
    """Column t predicts token t + 1, the MTP layer's column t token t + 2."""
    a = tokens[:1, :96].clone()
    b = a.clone()
    b[:, 64:] = 0x20
    (main_a, mtp_a), (main_b, mtp_b) = model(a, mtp=True), model(b, mtp=True)
    torch.testing.assert_close(main_a[:, :64], main_b[:, :64], rtol=0, atol=1e-3)
    torch.testing.assert_close(mtp_a[:, :63], mtp_b[:, :63], rtol=0, atol=1e-3)
    assert (main_a[:, 64] - main_b[:, 64]).abs().max() > 0.1
    assert (mtp_a[:, 63] - mtp_b[:, 63]).abs().max() > 0.1


def test_heldout_perplexity_is_below_the_3_gram_model_s(report):
    assert report.num_bytes == WINDOWS * WINDOW
    assert report.perplexity < TRIGRAM_PERPLEXITY / 2
    assert report.mtp_perplexity < TRIGRAM_PERPLEXITY / 2


def test_every_expert_is_used(report):
    assert len(report.expert_share) == 2
    for layer in report.expert_share:
        assert len(layer) == CONFIG["n_routed_experts"]
        # an even share is 1/8
        assert min(layer) > 0.05 and max(layer) < 0.25


def test_mtp_layer_agrees_with_the_main_model(report):
    assert report.mtp_agreement > 0.75


def test_float32_activation_scales_leave_the_training_forward(model, tokens):
    """The distance that serving with activation_scale="fp32" would show; measured 5e-3."""
    trained = logits(model, tokens[:3])
    rounded = kl_divergence(trained, logits(model, tokens[:3], activation_scale="fp32")).mean()
    assert 3e-3 < rounded < 2e-2
    none = kl_divergence(trained, logits(model, tokens[:3], activation_scale="none")).mean()
    assert 1e-3 < none < 2e-2


def test_unknown_activation_scale_is_refused(model):
    with pytest.raises(ValueError, match="'fp8'; allowed: ue8m0, fp32, none"):
        model(torch.tensor([[BOS]]), activation_scale="fp8")


def test_ngram_is_a_distribution():
    ngram = NGram([b"abracadabra", b"banana"], order=2)
    for history in (b"a", b"z"):
        first = ngram.bits(history)
        total = sum(2 ** (first - ngram.bits(history + bytes([c]))) for c in range(256))
        assert total == pytest.approx(1.0)
    assert ngram.bits(b"ana") < ngram.bits(b"nnn")
