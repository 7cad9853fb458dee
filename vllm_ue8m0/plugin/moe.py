"""The fused-MoE method and its modular experts class.

Activations reach the experts as bf16 in every parallel layout and are quantized inside the
project's op: vLLM's own dispatch would quantize them with float32 scales (its `w8a16` config is
used for exactly that reason). 1 x 128 groups commute with dispatch, so the result is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import library  # noqa: F401  (defines torch.ops.vllm_ue8m0)
from ..formats import BLOCK
from ..layouts import common_gran, grid_shape
from . import compat
from .linear import (
    DUMMY_SCALE,
    check_group,
    empty_scale,
    empty_weight,
    fix_dummy_scales,
    is_dummy_load,
    scale_loader,
    weight_loader,
)
from .weights import encode

if TYPE_CHECKING:
    from .config import Ue8m0Config


@dataclass(frozen=True)
class ExpertsFormat:
    """What the experts need beyond vLLM's quant config, to which it is attached.

    c13 [E, grid rows], c2: float32 factors of the output rows, None for all 1.
    """

    gran13: tuple[int, int]
    gran2: tuple[int, int]
    c13: torch.Tensor | None
    c2: torch.Tensor | None
    activation_scale: str


class Ue8m0Experts(compat.FusedMoEExpertsModular):  # type: ignore[misc]
    """Routed experts, contiguous format: quantize, GEMM, SiLU * up, quantize, GEMM, reduce."""

    @staticmethod
    def activation_format() -> Any:
        return compat.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return True  # dispatch.choose has the last word, with reasons

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return bool(activation == compat.MoEActivation.SILU)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        # These two, of vLLM 0.33, dispatch inside the experts.
        return not any(
            getattr(moe_parallel_config, f"use_{kind}", False)
            for kind in ("passthrough_all2all", "moonep_kernels")
        )

    def finalize_weight_and_reduce_impl(self) -> Any:
        return compat.TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, *rest: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return (0,), (0,), (M, K)  # the op allocates its own buffers

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        fmt: ExpertsFormat = self.quant_config.ue8m0
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)  # prepare has applied them
        torch.ops.vllm_ue8m0.experts(
            output,
            hidden_states,
            w1,
            self.w1_scale,
            fmt.c13,
            w2,
            self.w2_scale,
            fmt.c2,
            topk_weights,
            topk_ids,
            fmt.gran13,
            fmt.gran2,
            fmt.activation_scale,
            False,
            expert_map,
        )


class Ue8m0MoEMethod(compat.FusedMoEMethodBase):  # type: ignore[misc]
    """Creates, loads and encodes expert weights; `apply` hands them to the modular kernel."""

    experts_cls = Ue8m0Experts

    def __init__(self, config: Ue8m0Config, moe: Any, prefix: str) -> None:
        super().__init__(moe)
        self.config = config
        self.prefix = prefix

    @property
    def supports_eplb(self) -> bool:
        return True  # every per-expert state is a Parameter with the experts first

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
        self.dummy = is_dummy_load()
        load = extra.pop("weight_loader")
        # Loaders split a checkpoint tensor evenly, so its refined grid must end with its rows.
        for name, shape, gran, whole in (
            ("w13", (2 * I, H), self.gran13, (I * tp_size, H)),
            ("w2", (H, I), self.gran2, (H, I * tp_size)),
        ):
            where = f"{self.prefix}.{name}"
            weight = torch.nn.Parameter(empty_weight(num_experts, *shape), requires_grad=False)
            compat.set_weight_attrs(weight, {**extra, "weight_loader": weight_loader(load, where)})
            scale = torch.nn.Parameter(
                empty_scale(num_experts, *grid_shape(shape[0], shape[1], gran)), requires_grad=False
            )
            compat.set_weight_attrs(
                scale,
                {
                    **extra,
                    "weight_loader": scale_loader(
                        load, gran, where, grid_shape(whole[0], whole[1], gran)
                    ),
                    "quant_method": compat.FusedMoeWeightScaleSupported.BLOCK.value,
                    "dummy_weight_value": DUMMY_SCALE,
                },
            )
            layer.register_parameter(f"{name}_weight", weight)
            layer.register_parameter(f"{name}_weight_scale_inv", scale)

    def process_weights_after_loading(self, layer: Any) -> None:
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
            if done.kind == "requantized":
                compat.replace_parameter(layer, f"{name}_weight", done.w)
            compat.replace_parameter(layer, f"{name}_weight_scale_inv", done.sf)
            if done.c is None:
                setattr(layer, f"{name}_weight_scale_c", None)
            else:
                compat.replace_parameter(layer, f"{name}_weight_scale_c", done.c)
            kinds.append(done.kind)
        self.dummy = False  # a real reload may follow
        self._build_kernel(layer)
        finer = {self.gran13, self.gran2} != {(BLOCK, BLOCK)}
        kind = kinds[0] if kinds[0] == kinds[1] else " / ".join(kinds)
        self.config.layer_done("experts", kind, finer, layer.w13_weight.device)

    def _build_kernel(self, layer: Any) -> None:
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        prepare_finalize = compat.make_prepare_finalize(self.moe, self.moe_quant_config, layer)
        ok, reason = Ue8m0Experts.is_supported_config(
            Ue8m0Experts, self.moe, None, None, prepare_finalize.activation_format
        )
        if not ok:
            raise NotImplementedError(
                f"{self.prefix}: the ue8m0 experts do not serve this configuration: {reason}. "
                "Allowed: SiLU-gated experts, tensor, expert and data parallelism with an "
                "all-to-all backend of the standard format (the default is), no LoRA on experts."
            )
        experts = Ue8m0Experts(moe_config=self.moe, quant_config=self.moe_quant_config)
        self.moe_kernel = compat.FusedMoEKernel(prepare_finalize, experts)

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
