"""The modular experts classes, one for each format in which vLLM's all-to-alls deliver tokens.

  Ue8m0Experts          [tokens, H] with the ids of their experts; the result is weighted and summed
  Ue8m0BatchedExperts   [local experts, T, H] with counts on the device, from DeepEP low-latency and
                        NIXL; the combine step weights and sums

Constructors are vLLM's (`moe_config, quant_config, max_num_tokens, num_dispatchers`): elastic
expert parallelism compares their signature before it makes new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .. import dispatch, library  # noqa: F401  (library defines torch.ops.vllm_ue8m0)
from . import compat


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
        return not compat.dispatches_inside_experts(moe_parallel_config)

    @staticmethod
    def _supports_batch_invariance() -> bool:
        # The kernels' tiles are then of heights that one kind of instruction multiplies; torch's
        # products sum in an order that depends on the rows.
        return dispatch.choose("experts", compat.platform()).name != "reference"

    def finalize_weight_and_reduce_impl(self) -> Any:
        return compat.TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
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
        if apply_router_weight_on_input:
            topk_weights = torch.ones_like(topk_weights)  # prepare has applied them
        self.compute(output, hidden_states, w1, w2, topk_weights, topk_ids, expert_map, False)

    def compute(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        weight_on_input: bool,
    ) -> None:
        """hidden_states [M, H] -> output [M, H], contiguous; topk_weights, topk_ids [M, topk]."""
        fmt: ExpertsFormat = self.quant_config.ue8m0
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
            weight_on_input,
            expert_map,
        )


class Ue8m0BatchedExperts(Ue8m0Experts):
    """Routed experts, batched format: every local expert's tokens already lie together."""

    @staticmethod
    def activation_format() -> Any:
        return compat.FusedMoEActivationFormat.BatchedExperts

    def finalize_weight_and_reduce_impl(self) -> Any:
        return compat.TopKWeightAndReduceDelegate()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        # M is the dispatched tensor's own T, and not always max_num_tokens * num_dispatchers: NIXL
        # may have room for more ranks than there are.
        return (0,), (0,), (local_num_experts, M, K)

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
        torch.ops.vllm_ue8m0.batched_experts(
            output,
            hidden_states,
            w1,
            self.w1_scale,
            fmt.c13,
            w2,
            self.w2_scale,
            fmt.c2,
            # vLLM's local reorganization without an all-to-all counts for the experts of all ranks.
            expert_tokens_meta.expert_num_tokens[: w1.shape[0]],
            fmt.gran13,
            fmt.gran2,
            fmt.activation_scale,
        )
