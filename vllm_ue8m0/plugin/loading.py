"""Between a checkpoint and `process_weights_after_loading`: vLLM's loaders, wrapped, and reloads.

vLLM reloads weights layer by layer (model_loader/reload): it makes a layer's parameters anew as
they were created, loads and processes them, and copies the outcome, by value, into the tensors that
serve. What has been encoded is marked as served: such a parameter is nothing to load into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..formats import BLOCK, FP8_NAN_CODE, MIN_GROUP_K
from . import compat
from .weights import decode_loaded_scale

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


def mark_served(layer: Any, *names: str) -> None:
    """The named parameters are encoded now."""
    layer.ue8m0_served = True
    for name in names:
        getattr(layer, name).ue8m0_served = True


def is_served(layer_or_parameter: Any) -> bool:
    return getattr(layer_or_parameter, "ue8m0_served", False)


def begin_load(layer: Any, param: Any, where: str) -> None:
    """Before every load: refuse served parameters, blank those that a reload has made.

    Raises ValueError, naming `where`, for a served one: its bytes would be copied into by value.
    """
    if is_served(param):
        raise ValueError(
            f"{where}: load_weights on a model that is already served, whose weights are encoded. "
            "Allowed: vLLM's reload, which loads and encodes layer by layer: "
            "llm.collective_rpc('reload_weights', kwargs={'weights_path': DIR}), or its weight "
            "transfer (start_weight_update, update_weights, finish_weight_update)."
        )
    if not is_served(layer) or param.is_meta or hasattr(param, "ue8m0_blank"):
        return  # a first load, a reload that only counts elements, or done for this layer
    for name, fresh in layer.named_parameters(recurse=False):
        if fresh.dtype == E4M3:
            fresh.data.view(torch.uint8).fill_(FP8_NAN_CODE)
        elif name.endswith("_scale_inv"):
            fresh.data.fill_(torch.nan)
        fresh.ue8m0_blank = True


def weight_loader(load: Callable[..., Any], layer: Any, where: str) -> Callable[..., Any]:
    """vLLM's loader, which would turn bf16 weights into FP8 codes by value without a word.

    Arguments have its names: some models give them by keyword.
    """

    @functools.wraps(load)
    def checked(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        begin_load(layer, param, where)
        if loaded_weight.dtype != E4M3:
            raise ValueError(
                f"{where}: the checkpoint's weight is {loaded_weight.dtype}, expected {E4M3}. If "
                "the layer is not quantized, name it in quantization_config's "
                "'modules_to_not_convert'; otherwise convert the checkpoint with "
                "`vllm-ue8m0 convert SRC DST --to ue8m0`."
            )
        return load(param, loaded_weight, *args, **kwargs)

    return checked


def scale_loader(
    load: Callable[..., Any],
    layer: Any,
    gran: tuple[int, int],
    where: str,
    limit: tuple[int | None, int | None] = (None, None),
) -> Callable[..., Any]:
    """vLLM's loader behind decoding by value and refining to the layer's grid.

    Tensor.copy_ converts numbers: a uint8 exponent would become 0..255. `limit` is the refined
    grid's shape for the whole checkpoint tensor, where the loader needs it without excess.
    """

    @functools.wraps(load)
    def decoded(param: Any, loaded_weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        begin_load(layer, param, where)
        scale = decode_loaded_scale(loaded_weight, gran, (BLOCK, BLOCK), where)
        scale = scale[..., : limit[0], : limit[1]]
        try:
            return load(param, scale, *args, **kwargs)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{where}: a weight scale of shape {tuple(loaded_weight.shape)} does not fit; "
                f"allowed: [ceil(N/{BLOCK}), ceil(K/{BLOCK})] of its weight (this rank's grid is "
                f"{tuple(param.shape)} of {gran[0]}x{gran[1]} blocks). Transposed or truncated?"
            ) from error

    return decoded


def fix_dummy_scales(scale: torch.Tensor) -> torch.Tensor:
    """vLLM's dummy loader writes small random numbers; replace what cannot be a scale."""
    return torch.where(torch.frexp(scale.abs())[0] == 0.5, scale.abs(), DUMMY_SCALE)
