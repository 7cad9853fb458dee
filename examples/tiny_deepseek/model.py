"""DeepSeek-V3 in plain torch, computed the way vLLM serves it in bf16 with UE8M0 block FP8.

The training forward and, after `TinyDeepseek.from_checkpoint`, the ground truth that a served model
is compared with. Tensors are float32 throughout and hold bf16 values wherever vLLM's are bf16
(`bf16` below): residual stream, every linear's output, both roundings of RMSNorm, silu and its
product with up, router logits, each weighted expert output, their sum, the scaled sum, the logits.
These places matter: one bf16 ulp can be another e4m3 code, see docs/tiny_deepseek.md.

  quantized      q_a, q_b, kv_a, kv_b, o, and gate/up/down of dense, shared and routed MLPs: weights
                 in 128x128 blocks, activations in 1x128 groups, power-of-two scales (quant.py)
  bf16           embedding, lm_head, router gate, norms, eh_proj of the MTP layer
  gradients      straight through every rounding; the weights being trained are float32

Products are float32 products of those operands, so TF32 keeps them exact. All routed experts are
computed for all tokens and weighted with 0 or the routing weight: the same bits as computing the
selected ones, and shapes that do not depend on the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quant import activation_quantizer, bf16, fake_quant_weight, straight_through


@dataclass(frozen=True)
class Rounding:
    """Where implementations of the same op differ; the defaults are vLLM's native ones (CPU)."""

    rope_products: bool = True  # x * cos and x' * sin are rounded before they are added
    residual_before_norm: bool = False  # RMSNorm sees the rounded sum
    normed: bool = True  # RMSNorm's x / rms is rounded before it is multiplied by the weight


# vLLM 0.26's CUDA kernels. The norms are checked: recorded on an H100, their outputs equal this
# bit for bit (2026-11-22). RoPE is not.
CUDA = Rounding(rope_products=False, residual_before_norm=True, normed=False)


@dataclass(frozen=True)
class Context:
    """What all layers of one forward share."""

    act: Callable[[Tensor], Tensor]  # quantizes the input of a quantized linear
    cos: Tensor  # [T, 1, rope dim / 2]
    sin: Tensor
    rounding: Rounding


class QuantLinear(nn.Module):
    """[*lead, N, K] quantized weights; the input has been quantized. Returns float32, unrounded."""

    frozen = False  # True: the weight holds dequantized checkpoint values already

    def __init__(self, K: int, N: int, *lead: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*lead, N, K) * gain * K**-0.5)

    def values(self) -> Tensor:
        w = self.weight
        return w if self.frozen else straight_through(w, fake_quant_weight(w.detach()))

    def forward(self, a: Tensor) -> Tensor:
        return F.linear(a, self.values())


class Bf16Linear(nn.Module):
    """A linear that is not quantized: bf16 weight and output."""

    def __init__(self, K: int, N: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N, K) * std)

    def forward(self, x: Tensor) -> Tensor:
        return bf16(F.linear(x, bf16(self.weight)))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return bf16((bf16(normed) if ctx.rounding.normed else normed) * bf16(self.weight))


def rope(x: Tensor, ctx: Context) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of x [B, T, heads, D]."""
    even, odd = x[..., ::2], x[..., 1::2]
    r = bf16 if ctx.rounding.rope_products else lambda product: product
    first = r(even * ctx.cos) - r(odd * ctx.sin)
    second = r(odd * ctx.cos) + r(even * ctx.sin)
    return bf16(torch.stack((first, second), -1).flatten(-2))


class Attention(nn.Module):
    """Multi-head latent attention, not absorbed (the form that prefill uses)."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        self.heads, self.lora = c.num_attention_heads, c.kv_lora_rank
        self.nope, self.rope, self.v = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        self.q_a_proj = QuantLinear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = QuantLinear(c.q_lora_rank, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = QuantLinear(c.hidden_size, self.lora + self.rope)
        self.kv_a_layernorm = RMSNorm(self.lora, c.rms_norm_eps)
        self.kv_b_proj = QuantLinear(self.lora, self.heads * (self.nope + self.v))
        self.o_proj = QuantLinear(self.heads * self.v, c.hidden_size, gain=0.4)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        act = ctx.act
        a = act(x)
        q = self.q_b_proj(act(self.q_a_layernorm(bf16(self.q_a_proj(a)), ctx)))
        latent, k_rope = bf16(self.kv_a_proj_with_mqa(a)).split([self.lora, self.rope], -1)
        kv = self.kv_b_proj(act(self.kv_a_layernorm(latent, ctx)))
        q, kv = (bf16(t).unflatten(-1, (self.heads, -1)) for t in (q, kv))
        (q, q_rope), (k, v) = q.split([self.nope, self.rope], -1), kv.split([self.nope, self.v], -1)
        k_rope = rope(k_rope.unsqueeze(2), ctx).expand(-1, -1, self.heads, -1)
        q, k = torch.cat((q, rope(q_rope, ctx)), -1), torch.cat((k, k_rope), -1)
        # Fused attention kernels want v as wide as q and k.
        v = F.pad(v, (0, q.shape[-1] - self.v))
        q, k, v = (
            t.transpose(1, 2).to(torch.bfloat16 if t.is_cuda else t.dtype) for t in (q, k, v)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).to(torch.float32)
        out = bf16(out[..., : self.v].transpose(1, 2).flatten(-2))
        return bf16(self.o_proj(act(out)))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return bf16(bf16(F.silu(bf16(gate))) * bf16(up))


class MLP(nn.Module):
    def __init__(self, H: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = QuantLinear(H, inner), QuantLinear(H, inner)
        self.down_proj = QuantLinear(inner, H, gain=0.4)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        a = ctx.act(x)
        return bf16(self.down_proj(ctx.act(silu_mul(self.gate_proj(a), self.up_proj(a)))))


class Gate(Bf16Linear):
    """noaux_tc: sigmoid scores; the bias moves the selection only, within the best groups."""

    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__(c.hidden_size, c.n_routed_experts, 0.02)
        self.config = c
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Routing weights [..., E], zero for the experts that are not selected."""
        c = self.config
        scores = super().forward(x).sigmoid()
        biased = scores.detach() + self.e_score_correction_bias
        groups = biased.unflatten(-1, (c.n_group, -1)).topk(2).values.sum(-1)
        kept = torch.zeros_like(groups).scatter(-1, groups.topk(c.topk_group).indices, 1.0)
        kept = kept.repeat_interleave(c.n_routed_experts // c.n_group, -1)
        ids = biased.masked_fill(kept == 0, -torch.inf).topk(c.num_experts_per_tok).indices
        weights = scores * torch.zeros_like(scores).scatter(-1, ids, 1.0)
        return weights / weights.sum(-1, keepdim=True)


class MoE(nn.Module):
    def __init__(self, c: SimpleNamespace) -> None:
        super().__init__()
        E, H, inner = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.factor = c.routed_scaling_factor
        self.gate = Gate(c)
        self.experts = nn.ModuleDict(
            {name: QuantLinear(H, inner, E) for name in ("gate_proj", "up_proj")}
        )
        self.experts["down_proj"] = QuantLinear(inner, H, E, gain=0.4)
        self.shared_experts = MLP(H, inner * c.n_shared_experts)

    def routed(self, x: Tensor, weights: Tensor, ctx: Context) -> Tensor:
        a, E = ctx.act(x), weights.shape[-1]
        gate, up = (
            F.linear(a, self.experts[name].values().flatten(0, 1)).unflatten(-1, (E, -1))
            for name in ("gate_proj", "up_proj")
        )
        inner = ctx.act(silu_mul(gate, up)).flatten(0, -3).transpose(0, 1)  # [E, tokens, inner]
        out = torch.bmm(inner, self.experts["down_proj"].values().mT).transpose(0, 1)
        return bf16(bf16(out.view(*weights.shape, -1) * weights[..., None]).sum(-2))

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        weights = self.gate(x)
        self.counts = (weights.detach() > 0).flatten(0, -2).sum(0)
        scaled = bf16(self.routed(x, weights, ctx) * self.factor)
        return bf16(self.shared_experts(x, ctx) + scaled)


class Layer(nn.Module):
    def __init__(self, c: SimpleNamespace, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        dense = index < c.first_k_dense_replace
        self.mlp = MLP(c.hidden_size, c.intermediate_size) if dense else MoE(c)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """Takes and returns residual + branch, which ctx may leave for the next norm to round."""
        before_norm = bf16 if ctx.rounding.residual_before_norm else lambda total: total
        x = before_norm(bf16(x) + self.self_attn(self.input_layernorm(x, ctx), ctx))
        return before_norm(bf16(x) + self.mlp(self.post_attention_layernorm(x, ctx), ctx))


class MTPLayer(Layer):
    """The block after the last one; embedding and head are the main model's."""

    def __init__(self, c: SimpleNamespace, index: int) -> None:
        super().__init__(c, index)
        H = c.hidden_size
        self.enorm, self.hnorm = RMSNorm(H, c.rms_norm_eps), RMSNorm(H, c.rms_norm_eps)
        self.eh_proj = Bf16Linear(2 * H, H, (2 * H) ** -0.5)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(H, c.rms_norm_eps)})

    def predict(self, hidden: Tensor, embedded: Tensor, ctx: Context) -> Tensor:
        joined = torch.cat((self.enorm(embedded, ctx), self.hnorm(hidden, ctx)), -1)
        return self.shared_head["norm"](bf16(self.forward(self.eh_proj(joined), ctx)), ctx)


class TinyDeepseek(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = c = SimpleNamespace(**config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        layers = [Layer(c, i) for i in range(c.num_hidden_layers)]
        self.model.layers = nn.ModuleList([*layers, MTPLayer(c, c.num_hidden_layers)])
        self.model.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = Bf16Linear(c.hidden_size, c.vocab_size, 0.02)
        D = c.qk_rope_head_dim
        frequency = 1.0 / c.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
        angle = torch.outer(torch.arange(c.max_position_embeddings).float(), frequency)
        # vLLM keeps the table in the model's dtype.
        self.register_buffer("cos", bf16(angle.cos()), persistent=False)
        self.register_buffer("sin", bf16(angle.sin()), persistent=False)

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> TinyDeepseek:
        """The model of an exported folder, quantized or bf16; its weights are used as they are."""
        from .checkpoint import read_weights  # it imports this module

        model = cls(json.loads((Path(folder) / "config.json").read_text()))
        model.load_state_dict(read_weights(folder))
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.frozen = True
        return model.eval().requires_grad_(False)

    def forward(
        self,
        tokens: Tensor,
        activation_scale: str = "ue8m0",
        mtp: bool = False,
        rounding: Rounding = Rounding(),
    ) -> tuple[Tensor, Tensor | None]:
        """tokens [B, T] -> float32 logits [B, T, V] of token t + 1, and the MTP layer's of t + 2.

        The MTP layer reads the true token t + 1: its last column means nothing.
        """
        cos, sin = (table[: tokens.shape[1], None] for table in (self.cos, self.sin))
        ctx = Context(activation_quantizer(activation_scale), cos, sin, rounding)
        x = embedded = bf16(self.model.embed_tokens(tokens))
        *layers, mtp_layer = self.model.layers
        for layer in layers:
            x = layer(x, ctx)
        hidden = self.model.norm(x, ctx)
        if not mtp:
            return self.lm_head(hidden), None
        following = embedded.roll(-1, 1)
        # vLLM's MTP layer gets no embedding at position 0.
        following = torch.cat((torch.zeros_like(following[:, :1]), following[:, 1:]), 1)
        predicted = mtp_layer.predict(hidden, following, ctx)
        return self.lm_head(hidden), self.lm_head(predicted)

    def expert_counts(self) -> Tensor:
        """Tokens per expert of the last forward, [MoE layers, E], the MTP layer last."""
        return torch.stack([m.counts for m in self.modules() if isinstance(m, MoE)])
