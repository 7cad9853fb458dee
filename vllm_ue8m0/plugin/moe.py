"""The fused-MoE method: it creates, loads and encodes the weights of a layer of routed experts.

Activations reach the experts as bf16 in every parallel layout and are quantized inside the
project's op: vLLM's own dispatch would quantize them with float32 scales (its `w8a16` config is
used for exactly that reason). 1 x 128 groups commute with dispatch, so the result is the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import warmup
from ..formats import BLOCK
from ..layouts import common_gran, grid_shape
from . import compat, gate
from .experts import ExpertsFormat, Ue8m0BatchedExperts, Ue8m0Experts
from .loading import (
    DUMMY_SCALE,
    check_group,
    empty_scale,
    empty_weight,
    fix_dummy_scales,
    is_dummy_load,
    is_served,
    mark_served,
    scale_loader,
    weight_loader,
)
from .shared import take_activation
from .weights import encode, like_served, uniform

if TYPE_CHECKING:
    from .config import Ue8m0Config


class Ue8m0MoEMethod(compat.FusedMoEMethodBase):  # type: ignore[misc]
    """Creates, loads and encodes expert weights; `apply` runs them, after an all-to-all if any."""

    experts_cls = Ue8m0Experts

    def __init__(self, config: Ue8m0Config, moe: Any, prefix: str) -> None:
        super().__init__(moe)
        self.config = config
        self.prefix = prefix

    @property
    def supports_eplb(self) -> bool:
        # Every per-expert state is a contiguous Parameter with the experts first, and nothing
        # else is one; `uniform` makes them the same for all layers and ranks.
        return True

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        H, I = hidden_size, intermediate_size_per_partition  # noqa: E741
        unpadded = extra.get("unpadded_hidden_size", H)
        if unpadded != H:
            raise NotImplementedError(
                f"{self.prefix}: the all-to-all backend moves hidden sizes of {H}, not the model's "
                f"{unpadded}, and padded experts are not served. Allowed: another "
                "--all2all-backend, e.g. the default allgather_reducescatter."
            )
        tp_size = self.moe.moe_parallel_config.tp_size
        # The boundary between gate and up, and every shard's, lie at multiples of I; an uncut
        # intermediate size may have a partial last block.
        cut = common_gran([I]) if tp_size > 1 else BLOCK
        self.gran13 = (common_gran([I]), BLOCK)
        self.gran2 = (BLOCK, cut)
        check_group(cut, I, self.prefix)
        layer.weight_block_size = [BLOCK, BLOCK]
        layer.orig_dtype = params_dtype
        layer.num_experts = num_experts
        self.served: dict[str, tuple[bool, bool]] = {}  # scales as bytes, with c; of the first load
        self.dummy = is_dummy_load()
        load = extra.pop("weight_loader")
        # Loaders split a checkpoint tensor evenly, so its refined grid must end with its rows.
        for name, shape, gran, whole in (
            ("w13", (2 * I, H), self.gran13, (I * tp_size, H)),
            ("w2", (H, I), self.gran2, (H, I * tp_size)),
        ):
            where = f"{self.prefix}.{name}"
            weight = torch.nn.Parameter(empty_weight(num_experts, *shape), requires_grad=False)
            compat.set_weight_attrs(
                weight, {**extra, "weight_loader": weight_loader(load, layer, where)}
            )
            scale = torch.nn.Parameter(
                empty_scale(num_experts, *grid_shape(shape[0], shape[1], gran)), requires_grad=False
            )
            compat.set_weight_attrs(
                scale,
                {
                    **extra,
                    "weight_loader": scale_loader(
                        load, layer, gran, where, grid_shape(whole[0], whole[1], gran)
                    ),
                    "quant_method": compat.FusedMoeWeightScaleSupported.BLOCK.value,
                    "dummy_weight_value": DUMMY_SCALE,
                },
            )
            layer.register_parameter(f"{name}_weight", weight)
            layer.register_parameter(f"{name}_weight_scale_inv", scale)

    def process_weights_after_loading(self, layer: Any) -> None:
        if is_served(layer.w13_weight):
            return  # nothing was loaded since
        kinds = []
        for name, gran, halves in (("w13", self.gran13, 2), ("w2", self.gran2, 1)):
            weight = getattr(layer, f"{name}_weight").data
            scale = getattr(layer, f"{name}_weight_scale_inv").data
            if self.dummy:
                scale = fix_dummy_scales(scale)
            done = encode(
                weight,
                scale,
                [scale.shape[1] // halves] * halves,
                gran,
                self.config.spec.non_pow2,
                f"{self.prefix}.{name}",
            )
            if self.moe.moe_parallel_config.enable_eplb:
                done = uniform(done, self.config.spec, f"{self.prefix}.{name}")
            if name in self.served:
                done = like_served(done, *self.served[name], f"{self.prefix}.{name}")
            self.served[name] = done.sf.dtype == torch.uint8, done.c is not None
            if done.kind == "requantized":
                # In place: load balancing pairs the parameters of layers by their order.
                weight.copy_(done.w)
            compat.replace_parameter(layer, f"{name}_weight_scale_inv", done.sf)
            if done.c is None:
                setattr(layer, f"{name}_weight_scale_c", None)
            else:
                compat.replace_parameter(layer, f"{name}_weight_scale_c", done.c)
            mark_served(layer, f"{name}_weight", f"{name}_weight_scale_inv")
            kinds.append(done.kind)
        self.dummy = False  # a real reload may follow
        if self.moe_kernel is None:
            # Once: a reload copies its tensors into those that the kernel has.
            self._build_kernel(layer)
        finer = {self.gran13, self.gran2} != {(BLOCK, BLOCK)}
        kind = kinds[0] if kinds[0] == kinds[1] else " / ".join(kinds)
        operators = self._operator(layer), gate.take(self.prefix)
        self.config.layer_done("experts", kind, finer, layer.w13_weight.device, *operators)

    def _build_kernel(self, layer: Any) -> None:
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        prepare_finalize = compat.make_prepare_finalize(self.moe, self.moe_quant_config, layer)
        form, cls, limits = prepare_finalize.activation_format, Ue8m0Experts, {}
        if form == Ue8m0BatchedExperts.activation_format():
            self.experts_cls = cls = Ue8m0BatchedExperts
            limits = {
                "max_num_tokens": prepare_finalize.max_num_tokens_per_rank(),
                "num_dispatchers": prepare_finalize.num_dispatchers(),
            }
        ok, reason = cls.is_supported_config(cls, self.moe, None, None, form)
        if not ok:
            raise NotImplementedError(
                f"{self.prefix}: the ue8m0 experts do not serve this configuration: {reason}. "
                "Allowed: SiLU-gated experts, tensor, expert and data parallelism with any "
                "all-to-all backend that hands tokens to the experts (not passthrough, not "
                "moonep), no LoRA on experts; batch invariance on GPUs."
            )
        experts = cls(moe_config=self.moe, quant_config=self.moe_quant_config, **limits)
        self.moe_kernel = compat.FusedMoEKernel(prepare_finalize, experts)

    def _operator(self, layer: Any) -> warmup.Operator | None:
        """To warm up; not the batched format, whose only number of rows the profile run reaches."""
        if self.experts_cls is not Ue8m0Experts:
            return None
        return warmup.experts(
            layer.orig_dtype,
            layer.w13_weight,
            layer.w13_weight_scale_inv,
            layer.w13_weight_scale_c,
            layer.w2_weight,
            layer.w2_weight_scale_inv,
            layer.w2_weight_scale_c,
            self.gran13,
            self.gran2,
            self.config.spec.activation_scale,
            self.moe.experts_per_token,
            self.topk_indices_dtype or compat.router_ids_dtype(),
            layer.expert_map,
            compat.most_rows(self.prefix) * self.moe.moe_parallel_config.dp_size,
        )

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        config = compat.fp8_w8a16_moe_quant_config(
            w1_scale=layer.w13_weight_scale_inv,
            w2_scale=layer.w2_weight_scale_inv,
            block_shape=[BLOCK, BLOCK],
        )
        config.ue8m0 = ExpertsFormat(
            self.gran13,
            self.gran2,
            layer.w13_weight_scale_c,
            layer.w2_weight_scale_c,
            self.config.spec.activation_scale,
        )
        return config

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> Any:
        assert self.moe_kernel is not None
        if not torch.compiler.is_compiling():  # a graph would have its own idea of the module
            take_activation(shared_experts)
        if isinstance(self.moe_kernel.prepare_finalize, compat.MoEPrepareAndFinalizeNoDPEPModular):
            # Tokens stay where they are. vLLM's kernel would copy the result: 2 us of a decoded
            # token's layer (H200, vLLM 0.26, 2026-11-30).
            out = torch.empty_like(x, memory_format=torch.contiguous_format)
            self.moe_kernel.fused_experts.compute(
                out, x, layer.w13_weight, layer.w2_weight, topk_weights, topk_ids,
                layer.expert_map, layer.apply_router_weight_on_input,
            )  # fmt: skip
            return out
        return self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            shared_experts=shared_experts,
            shared_experts_input=shared_experts_input,
        )
