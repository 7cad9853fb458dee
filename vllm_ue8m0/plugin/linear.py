"""The linear method: block FP8 weights, activations quantized inside one op of this project.

Parameters keep the names and classes that vLLM's loaders expect: `weight` e4m3 [N, K] and
`weight_scale_inv` on a grid that divides every shard boundary. Scales are loaded as float32 and
become bytes (or stay float32, by policy) in `process_weights_after_loading`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .. import library, warmup  # noqa: F401  (library defines torch.ops.vllm_ue8m0)
from ..formats import BLOCK, FP8_NAN_CODE, MIN_GROUP_K
from ..layouts import ceil_div, common_gran, grid_shape, output_gran
from . import compat
from .weights import decode_loaded_scale, encode

if TYPE_CHECKING:
    from .config import Ue8m0Config

E4M3 = torch.float8_e4m3fn
DUMMY_SCALE = 2.0**-7


def is_dummy_load() -> bool:
    """Whether this process serves `--load-format dummy`."""
    config = compat.current_config()
    return config is not None and str(config.load_config.load_format) == "dummy"


def empty_weight(*shape: int) -> torch.Tensor:
    """An e4m3 tensor of NaN codes, so that a weight which is never loaded is noticed."""
    return torch.full(shape, FP8_NAN_CODE, dtype=torch.uint8).view(E4M3)


def empty_scale(*shape: int) -> torch.Tensor:
    """A float32 scale tensor of NaN, so that a scale which is never loaded is noticed."""
    return torch.full(shape, torch.nan, dtype=torch.float32)


def check_group(gran_k: int, size: int, where: str) -> None:
    if gran_k < MIN_GROUP_K:
        raise ValueError(
            f"{where}: {size} input columns per tensor-parallel rank leave scale groups of "
            f"{gran_k} columns; allowed: {MIN_GROUP_K} and more. Use a smaller "
            "--tensor-parallel-size, or --enable-expert-parallel for expert layers."
        )


def weight_loader(load: Callable[..., Any], where: str) -> Callable[..., Any]:
    """vLLM's loader, which would turn bf16 weights into FP8 codes by value without a word."""

    @functools.wraps(load)
    def checked(param: Any, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if loaded.dtype != E4M3:
            raise ValueError(
                f"{where}: the checkpoint's weight is {loaded.dtype}, expected {E4M3}. If the "
                "layer is not quantized, name it in quantization_config's "
                "'modules_to_not_convert'; otherwise convert the checkpoint with "
                "`vllm-ue8m0 convert SRC DST --to ue8m0`."
            )
        return load(param, loaded, *args, **kwargs)

    return checked


def scale_loader(
    load: Callable[..., Any],
    gran: tuple[int, int],
    where: str,
    limit: tuple[int | None, int | None] = (None, None),
) -> Callable[..., Any]:
    """vLLM's loader behind decoding by value and refining to the layer's grid.

    Tensor.copy_ converts numbers: a uint8 exponent would become 0..255. `limit` is the refined
    grid's shape for the whole checkpoint tensor, where the loader needs it without excess.
    """

    @functools.wraps(load)
    def decoded(param: Any, loaded: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = decode_loaded_scale(loaded, gran, (BLOCK, BLOCK), where)
        scale = scale[..., : limit[0], : limit[1]]
        try:
            return load(param, scale, *args, **kwargs)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{where}: a weight scale of shape {tuple(loaded.shape)} does not fit; allowed: "
                f"[ceil(N/{BLOCK}), ceil(K/{BLOCK})] of its weight (this rank's grid is "
                f"{tuple(param.shape)} of {gran[0]}x{gran[1]} blocks). Transposed or truncated?"
            ) from error

    return decoded


def fix_dummy_scales(scale: torch.Tensor) -> torch.Tensor:
    """vLLM's dummy loader writes small random numbers; replace what cannot be a scale."""
    return torch.where(torch.frexp(scale.abs())[0] == 0.5, scale.abs(), DUMMY_SCALE)


@compat.register_weight_loader_v2_supported_method
class Ue8m0LinearMethod(compat.LinearMethodBase):  # type: ignore[misc]
    """Every quantized linear layer: attention projections, dense and shared-expert MLPs."""

    def __init__(self, config: Ue8m0Config, prefix: str) -> None:
        self.config = config
        self.prefix = prefix

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
        self.dummy = is_dummy_load()
        load = extra["weight_loader"]
        layer.register_parameter(
            "weight",
            compat.ModelWeightParameter(
                data=empty_weight(N, K),
                input_dim=1,
                output_dim=0,
                weight_loader=weight_loader(load, self.prefix),
            ),
        )
        scale = compat.BlockQuantScaleParameter(
            data=empty_scale(*grid_shape(N, K, gran)),
            input_dim=1,
            output_dim=0,
            weight_loader=scale_loader(load, gran, self.prefix),
        )
        scale.dummy_weight_value = DUMMY_SCALE
        layer.register_parameter("weight_scale_inv", scale)

    def process_weights_after_loading(self, layer: Any) -> None:
        scale = layer.weight_scale_inv.data
        if self.dummy:
            scale = fix_dummy_scales(scale)
            self.dummy = False  # a real reload may follow
        gran = tuple(layer.weight_block_size)
        segments = [ceil_div(size, gran[0]) for size in layer.logical_widths]
        done = encode(
            layer.weight.data, scale, segments, gran, self.config.spec.non_pow2, self.prefix
        )
        if done.kind == "requantized":
            compat.replace_parameter(layer, "weight", done.w)
        compat.replace_parameter(layer, "weight_scale_inv", done.sf)
        if done.c is None:
            layer.weight_scale_c = None
        else:
            compat.replace_parameter(layer, "weight_scale_c", done.c)
        self.gran = gran
        if self.prefix.rsplit(".", 1)[-1] == "kv_b_proj":
            # The AMX MLA backend requantizes kv_b_proj to one scale per tensor whenever it sees
            # this attribute on an e4m3 weight; without it, it takes the exact values from `apply`.
            del layer.weight_block_size
        operator = warmup.linear(
            layer.orig_dtype,
            layer.weight,
            layer.weight_scale_inv,
            layer.weight_scale_c,
            getattr(layer, "bias", None),
            self.gran,
            self.config.spec.activation_scale,
            compat.most_rows(self.prefix),
        )
        finer = gran != (BLOCK, BLOCK)
        self.config.layer_done("linear", done.kind, finer, done.sf.device, operator)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype == E4M3:  # MLA with FP8 prefill hands its latent over as e4m3
            x = x.to(layer.orig_dtype)
        out: torch.Tensor = torch.ops.vllm_ue8m0.linear(
            x.reshape(-1, x.shape[-1]),
            layer.weight,
            layer.weight_scale_inv,
            layer.weight_scale_c,
            bias,
            self.gran,
            self.config.spec.activation_scale,
        )
        return out.view(*x.shape[:-1], out.shape[-1])
