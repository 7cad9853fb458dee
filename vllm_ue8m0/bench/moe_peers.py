"""Routed experts as vLLM 0.26 runs them, as peers of ours; vLLM is imported when one is called.

  vllm_triton         TritonExperts, which vLLM takes on sm_90 if a rank has parts of all experts
  deepgemm            DeepGemmExperts: DeepGEMM's contiguous grouped products, between a permutation
                      into rows padded to 128 for each expert and its inverse
  vllm_triton_fp32    TritonExperts with float32 activation scales

Each is vLLM's modular kernel, put together as in its oracle/fp8.py. The quantization before the
experts and the copy out of the workspace after them are in its time; putting it together is not.
vLLM rounds activation scales to powers of two where DeepGEMM is installed and
VLLM_USE_DEEP_GEMM_E8M0 is not 0, for every kind of experts: one process has either the first two or
the third.

A rank with some of the experts gives them the ids of all and `expert_map`, as under expert
parallelism without data parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..formats import BLOCK
from .case import Inputs, Operator, Outputs
from .peers import PeerAbsent, loaded, require_float32_layout

NO_UE8M0 = (
    "vLLM's activation scales are float32 here: DeepGEMM is not installed, or VLLM_USE_DEEP_GEMM "
    "or VLLM_USE_DEEP_GEMM_E8M0 is 0"
)
NO_FLOAT32 = "vLLM's activation scales are powers of two here; VLLM_USE_DEEP_GEMM_E8M0=0 is float32"


def experts() -> dict[str, Operator]:
    """Layers of inputs x [M, H] bf16, topk_weights, global_ids, w13, w13_s, w2, w2_s.

    global_ids are those of the model; expert_map [experts], if there is one, makes them local.
    """

    def deepgemm(inputs: Inputs) -> Outputs:
        require_float32_layout(inputs["x"])
        return _run("DeepGemmExperts", True, inputs)

    return {
        "vllm_triton": partial(_run, "TritonExperts", True),
        "deepgemm": deepgemm,
        "vllm_triton_fp32": partial(_run, "TritonExperts", False),
    }


def _run(experts_class: str, ue8m0: bool, t: Inputs) -> Outputs:
    if loaded(_load_rounding)() != ue8m0:
        raise PeerAbsent(NO_UE8M0 if ue8m0 else NO_FLOAT32)
    expert_map = t.get("expert_map")
    num_experts = t["w13"].shape[0] if expert_map is None else expert_map.numel()
    build, activation = loaded(_load_kernel)
    out = build(experts_class, num_experts, t).apply(
        hidden_states=t["x"],
        w1=t["w13"],
        w2=t["w2"],
        topk_weights=t["topk_weights"],
        topk_ids=t["global_ids"],
        activation=activation,
        global_num_experts=num_experts,
        expert_map=expert_map,
        apply_router_weight_on_input=False,
    )
    return [out]


def _load_rounding() -> Callable[[], bool]:
    from vllm.utils.deep_gemm import is_deep_gemm_e8m0_used

    return is_deep_gemm_e8m0_used  # type: ignore[no-any-return]


def _load_kernel() -> tuple[Callable[[str, int, Inputs], Any], Any]:
    """(Puts the kernel of an experts class together for inputs, the activation to call it with)."""
    from vllm.model_executor.layers.fused_moe import modular_kernel
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
        fp8_w8a8_moe_quant_config,
    )
    from vllm.model_executor.layers.fused_moe.experts.deep_gemm_moe import DeepGemmExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.v1.worker import workspace

    classes = {cls.__name__: cls for cls in (TritonExperts, DeepGemmExperts)}

    def build(experts_class: str, num_experts: int, t: Inputs) -> Any:
        x, w13, w2 = t["x"], t["w13"], t["w2"]
        # All kernels share one workspace, which moves when it grows. Every peer of a case is called
        # once before the first is captured, so that it does not move under a captured one.
        if not workspace.is_workspace_manager_initialized():
            workspace.init_workspace_manager(x.device)
        moe = FusedMoEConfig(
            num_experts=num_experts,
            experts_per_token=t["global_ids"].shape[1],
            hidden_dim=x.shape[1],
            intermediate_size=w2.shape[2],
            num_local_experts=w13.shape[0],
            num_logical_experts=num_experts,
            activation=MoEActivation.SILU,
            device=x.device,
            routing_method=RoutingMethodType.DeepSeekV3,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=torch.bfloat16,
        )
        quant = fp8_w8a8_moe_quant_config(
            w1_scale=t["w13_s"], w2_scale=t["w2_s"], block_shape=[BLOCK, BLOCK]
        )
        prepare = maybe_make_prepare_finalize(moe, quant, allow_new_interface=True)
        experts = classes[experts_class](moe_config=moe, quant_config=quant)
        return modular_kernel.FusedMoEKernel(prepare, experts)

    return build, MoEActivation.SILU
