"""The linear method: block FP8 weights, activations quantized inside one op of this project.

Parameters keep the names and classes that vLLM's loaders expect: `weight` e4m3 [N, K] and
`weight_scale_inv` on a grid that divides every shard boundary. Scales are loaded as float32 and
become bytes (or stay float32, by policy) in `process_weights_after_loading`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import warmup
from ..formats import BLOCK
from ..layouts import ceil_div, common_gran, grid_shape, output_gran
from ..library import OPS
from . import absorbed, compat, mla_cache
from .loading import (
    DUMMY_SCALE,
    E4M3,
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
from .weights import encode, like_served

if TYPE_CHECKING:
    from .config import Ue8m0Config


@compat.register_weight_loader_v2_supported_method
class Ue8m0LinearMethod(compat.LinearMethodBase):  # type: ignore[misc]
    """Every quantized linear layer: attention projections, dense and shared-expert MLPs."""

    def __init__(self, config: Ue8m0Config, prefix: str) -> None:
        self.config = config
        self.prefix = prefix
        self.activates = False  # see plugin/shared.py

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        N, K = sum(output_partition_sizes), input_size_per_partition
        gran = (
            output_gran(output_partition_sizes, output_size),
            BLOCK if input_size == K else common_gran([K]),
        )
        check_group(gran[1], K, self.prefix)
        layer.logical_widths = output_partition_sizes
        layer.weight_block_size = list(gran)
        layer.orig_dtype = params_dtype
        layer.input_size_per_partition = K
        layer.output_size_per_partition = N
        self.gran = gran
        self.served: tuple[bool, bool] | None = None  # scales as bytes, with c; of the first load
        self.dummy = is_dummy_load()
        load = extra["weight_loader"]
        layer.register_parameter(
            "weight",
            compat.ModelWeightParameter(
                data=empty_weight(N, K),
                input_dim=1,
                output_dim=0,
                weight_loader=weight_loader(load, layer, self.prefix),
            ),
        )
        scale = compat.BlockQuantScaleParameter(
            data=empty_scale(*grid_shape(N, K, gran)),
            input_dim=1,
            output_dim=0,
            weight_loader=scale_loader(load, layer, gran, self.prefix),
        )
        scale.dummy_weight_value = DUMMY_SCALE
        layer.register_parameter("weight_scale_inv", scale)

    def process_weights_after_loading(self, layer: Any) -> None:
        if is_served(layer.weight):
            return  # nothing was loaded since
        scale = layer.weight_scale_inv.data
        if self.dummy:
            scale = fix_dummy_scales(scale)
            self.dummy = False  # a real reload may follow
        gran = self.gran
        segments = [ceil_div(size, gran[0]) for size in layer.logical_widths]
        done = encode(
            layer.weight.data, scale, segments, gran, self.config.spec.non_pow2, self.prefix
        )
        if self.served is not None:
            done = like_served(done, *self.served, self.prefix)
        self.served = done.sf.dtype == torch.uint8, done.c is not None
        if done.kind == "requantized":
            compat.replace_parameter(layer, "weight", done.w)
        compat.replace_parameter(layer, "weight_scale_inv", done.sf)
        if done.c is None:
            layer.weight_scale_c = None
        else:
            compat.replace_parameter(layer, "weight_scale_c", done.c)
        mark_served(layer, "weight", "weight_scale_inv")
        name = self.prefix.rsplit(".", 1)[-1]
        if name == "q_b_proj":
            mla_cache.register(layer.weight, self.prefix)
        if name == "kv_b_proj" and hasattr(layer, "weight_block_size"):
            # The AMX MLA backend requantizes kv_b_proj to one scale per tensor whenever it sees
            # this attribute on an e4m3 weight; without it, it takes the exact values from `apply`.
            del layer.weight_block_size
        operator = warmup.linear(
            layer.orig_dtype,
            layer.weight,
            layer.weight_scale_inv,
            layer.weight_scale_c,
            getattr(layer, "bias", None),
            gran,
            self.config.spec.activation_scale,
            compat.most_rows(self.prefix),
            activated=name == "down_proj",
        )
        operators = [operator]
        if name == "kv_b_proj":
            operators.append(absorbed.take(self.prefix, layer.orig_dtype))
        finer = gran != (BLOCK, BLOCK)
        self.config.layer_done("linear", done.kind, finer, done.sf.device, *operators)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [.., K], or gate and up [.., 2 K] where this layer `activates`."""
        if x.dtype == E4M3:  # MLA with FP8 prefill hands its latent over as e4m3
            x = x.to(layer.orig_dtype)
        both = self.activates and x.shape[-1] == 2 * layer.input_size_per_partition
        operator = OPS.silu_mul_linear if both else OPS.linear
        out: torch.Tensor = operator(
            x.reshape(-1, x.shape[-1]),
            layer.weight,
            layer.weight_scale_inv,
            layer.weight_scale_c,
            bias,
            self.gran,
            self.config.spec.activation_scale,
        )
        return out.view(*x.shape[:-1], out.shape[-1])
