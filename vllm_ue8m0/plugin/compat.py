"""The only module that imports vLLM, and the one place for what differs between its releases.

`TESTED` has a file of signatures for every release, against which a test holds what is imported,
called and overridden here and in the modules that use this one. Names that pull in model code are
resolved on first use, so that registering the method costs milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import vllm
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

TESTED = ((0, 26), (0, 33))
GRAPH_PASS = "post_grad_custom_post_pass"  # Inductor's option

# By module; read by tools/signatures, which looks for them in every release.
_LAZY = {
    "vllm.model_executor.layers.activation": ("SiluAndMul",),
    "vllm.model_executor.layers.fused_moe": ("FusedMoEMethodBase", "RoutedExperts"),
    "vllm.model_executor.layers.fused_moe.activation": ("MoEActivation",),
    "vllm.model_executor.layers.fused_moe.config": ("fp8_w8a16_moe_quant_config",),
    "vllm.model_executor.layers.fused_moe.modular_kernel": (
        "FusedMoEActivationFormat",
        "FusedMoEExpertsModular",
        "FusedMoEKernel",
    ),
    "vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep": (
        "MoEPrepareAndFinalizeNoDPEPModular",
    ),
    "vllm.model_executor.layers.fused_moe.routed_experts": ("FusedMoeWeightScaleSupported",),
    "vllm.model_executor.layers.fused_moe.topk_weight_and_reduce": (
        "TopKWeightAndReduceDelegate",
        "TopKWeightAndReduceNoOP",
    ),
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method": (
        "UnquantizedFusedMoEMethod",
    ),
    "vllm.model_executor.layers.linear": (
        "LinearBase",
        "LinearMethodBase",
        "UnquantizedLinearMethod",
        "register_weight_loader_v2_supported_method",
    ),
    "vllm.model_executor.layers.quantization.utils.quant_utils": ("is_layer_skipped",),
    "vllm.model_executor.parameter": ("BlockQuantScaleParameter", "ModelWeightParameter"),
    "vllm.model_executor.utils": ("set_weight_attrs",),
}
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}
__all__ = [
    "QuantizationConfig",
    "add_graph_pass",
    "current_config",
    "deep_gemm_conditions",
    "dispatches_inside_experts",
    "has_norm",
    "init_logger",
    "knows_method",
    "make_prepare_finalize",
    "mla_cache",
    "most_rows",
    "norm_provider",
    "platform",
    "prefer_norm",
    "register_norm",
    "register_quantization_config",
    "replace_parameter",
    "router_ids_dtype",
    "shared_mlp",
    "version_warning",
    *_MODULE_OF,
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def version_warning(version: str = vllm.__version__) -> str | None:
    """What to tell a user whose vLLM is outside the tested range, or None."""
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        return None  # a development build
    if TESTED[0] <= (major, minor) <= TESTED[1]:
        return None
    low, high = (".".join(map(str, bound)) for bound in TESTED)
    return (
        f"vllm_ue8m0 was tested with vLLM {low} to {high}; this is {version}. It may work; if it "
        f"does not, install a tested release: pip install 'vllm>={low},<{TESTED[1][0]}."
        f"{TESTED[1][1] + 1}'"
    )


def current_config() -> Any:
    """The VllmConfig that the model is being built for, or None outside vLLM."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def replace_parameter(layer: Any, name: str, tensor: Any) -> None:
    """Swap a parameter's data, keeping its loader.

    By position: `new_data` is `new_tensor` since 0.28. Since 0.33 the parameter stays the same
    object, so read the attribute again rather than relying on either.
    """
    from vllm.model_executor.utils import replace_parameter as replace

    replace(layer, name, tensor)


def make_prepare_finalize(moe: Any, quant_config: Any, layer: Any) -> Any:
    """How tokens reach the experts and come back, from the keywords that all releases share.

    Further ones came and went: `eep_stage` until 0.29, `all2all_manager` since 0.30, `input_dtype`
    since 0.31.
    """
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize

    return maybe_make_prepare_finalize(
        moe=moe,
        quant_config=quant_config,
        routing_tables=layer._expert_routing_tables(),
        allow_new_interface=True,
        use_monolithic=False,
    )


def dispatches_inside_experts(moe_parallel_config: Any) -> bool:
    """Whether experts have to fetch their tokens themselves, which ours do not.

    These kinds of all-to-all are moonep, since 0.31, and passthrough, since 0.32.
    """
    kinds = ("use_moonep_kernels", "use_passthrough_all2all")
    return any(getattr(moe_parallel_config, kind, False) for kind in kinds)


# vLLM's MLA projects a prefill's cached context in chunks of at most so many rows, or of a block
# for each sequence (determine_chunked_prefill_workspace_size).
MLA_CONTEXT_ROWS = 64 * 1024


def most_rows(prefix: str) -> int:
    """The most rows that a step of this server has for the layer `prefix`; 1 outside vLLM."""
    config = current_config()
    if config is None:
        return 1
    most = int(config.scheduler_config.max_num_batched_tokens)
    if prefix.rsplit(".", 1)[-1] == "kv_b_proj":
        return max(most, MLA_CONTEXT_ROWS)
    return most


def shared_mlp(shared_experts: Any) -> Any:
    """The module that vLLM runs as shared experts, or None."""
    return getattr(shared_experts, "_layer", None)


# That write rows as they are given, to caches of their dtype.
_PLAIN_CACHES = ("MLAAttentionImpl.do_kv_cache_update", "CPUMLAImpl.do_kv_cache_update")


def mla_cache(name: str) -> tuple[Any, torch.Tensor, torch.Tensor] | None:
    """(implementation, cache, slots of this step's rows) of an MLA layer whose rows vLLM is about
    to write as they are, also in a replay of what is captured now; else None.

    A piecewise CUDA graph leaves that out, and its slots may be elsewhere the next time.
    """
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return None
    context = get_forward_context()
    attention = context.no_compile_layers.get(name)
    # A list of them where a step is two that overlap.
    slots = context.slot_mapping.get(name) if isinstance(context.slot_mapping, dict) else None
    if attention is None or slots is None or getattr(attention, "use_pcp", False):
        return None
    if getattr(attention, "hisparse_cache", None) is not None:  # since 0.33
        return None
    captured = slots.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured and context.cudagraph_runtime_mode != CUDAGraphMode.FULL:
        return None
    update = getattr(type(attention.impl), "do_kv_cache_update", None)
    plain = getattr(update, "__qualname__", None) in _PLAIN_CACHES
    return (attention.impl, attention.kv_cache, slots) if plain else None


def router_ids_dtype() -> torch.dtype:
    """Of the experts' ids, where no all-to-all wants another: int32 but of a simulated routing."""
    simulated = os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY")
    return torch.int64 if simulated else torch.int32


def register_norm(
    op: str, provider: str, run: Callable[..., Any], takes: Callable[..., bool]
) -> None:
    """Make an implementation of one of vLLM's norms known; vLLM warns once an order is set."""
    from vllm import ir

    if provider not in getattr(ir.ops, op).impls:
        getattr(ir.ops, op).register_impl(provider, supports_args=takes)(run)


def has_norm(op: str, provider: str) -> bool:
    """Whether register_norm did."""
    try:
        from vllm import ir

        return provider in getattr(ir.ops, op).impls
    except (ImportError, AttributeError):
        return False


def prefer_norm(op: str, provider: str) -> None:
    """Put it first in the model that is being built, where the order is still vLLM's default."""
    from vllm import ir
    from vllm.platforms import current_platform

    config = current_config()
    order = config.kernel_config.ir_op_priority  # vLLM's compile key has it
    default = getattr(current_platform.get_default_ir_op_priority(config), op)
    if getattr(order, op) == default:
        setattr(order, op, [provider, *default])
        getattr(ir.ops, op).set_default([provider, *default])


def norm_provider(target: Any, arguments: tuple[Any, ...]) -> tuple[str, str] | None:
    """Which of vLLM's norms a function of its graph is and who would run it, or None."""
    from vllm import ir

    for op in ("rms_norm", "fused_add_rms_norm"):
        if target is getattr(ir.ops, op).torch_op:
            return op, getattr(ir.ops, op).dispatch(*arguments).provider
    return None


def add_graph_pass(run: Callable[[Any], None], source: str) -> bool:
    """Have the model that is being built compiled with this pass over its graphs, after vLLM's own.

    False if another is there, which stays. `source` is in vLLM's key of compiled graphs.
    """
    from vllm.compilation.passes.inductor_pass import CallableInductorPass, InductorPass

    config = current_config()
    passes = config.compilation_config.inductor_compile_config
    ours = CallableInductorPass(run, InductorPass.hash_source(source))
    return getattr(passes.setdefault(GRAPH_PASS, ours), "callable", None) is run


def knows_method(name: str) -> bool:
    """Load plugins as every vLLM process does; whether `--quantization name` is known then."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return name in QUANTIZATION_METHODS


def deep_gemm_conditions() -> dict[str, Callable[[], Any]]:
    """What vLLM's own fp8 method asks before it rounds activation scales to powers of two.

    Each is a call that may fail; `used` is the conjunction as vLLM computes it. The last: whether
    FlashInfer, which keeps float32 scales, takes batches below 32 rows before DeepGEMM is asked.
    """
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.utils import deep_gemm, flashinfer, import_utils

    return {
        "gpu": lambda: current_platform.support_deep_gemm(),
        "installed": lambda: import_utils.has_deep_gemm(),
        "enabled": lambda: envs.VLLM_USE_DEEP_GEMM,
        "e8m0_enabled": lambda: envs.VLLM_USE_DEEP_GEMM_E8M0,
        "used": lambda: deep_gemm.is_deep_gemm_e8m0_used(),
        "flashinfer_below_32": lambda: flashinfer.is_flashinfer_fp8_blockscale_gemm_supported(),
    }


def platform() -> str:
    """vLLM's device type: "cuda", "cpu", ...; "" if it found none that it was built for."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)
