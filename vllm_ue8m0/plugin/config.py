"""`Ue8m0Config`: when the method is chosen, what it reads, and which method each layer gets.

An `fp8` checkpoint is taken only when the user says `--quantization ue8m0`; one whose
`quant_method` is `ue8m0` needs no flag; everything else on the machine is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import warmup
from ..checkpoint.check import check_local_checkpoint
from ..formats import ConfigError, QuantSpec, check_model_type
from . import compat, fusion, norms
from .weights import LoadReport

NAME = "ue8m0"
logger = compat.init_logger(f"vllm.{__name__}")
_warned = False


class Ue8m0Config(compat.QuantizationConfig):  # type: ignore[misc]
    """vLLM's QuantizationConfig for block FP8 with UE8M0 scales."""

    def __init__(self, spec: QuantSpec | None = None) -> None:
        super().__init__()
        if spec is None:
            raise ConfigError(
                "--quantization ue8m0: the checkpoint's config.json has no quantization_config, "
                "so its weights are not FP8. Quantize it first: "
                "`vllm-ue8m0 convert SRC DST --to ue8m0`, then serve DST."
            )
        self.spec = spec
        self.ignored_layers = list(spec.ignored_layers)
        self.report = LoadReport()
        self._options_read = False
        # What to warm up; None when that is done, so that a reload keeps no weights alive.
        self._operators: list[warmup.Operator] | None = []

    def __repr__(self) -> str:
        return f"Ue8m0Config({self.spec})"

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        # float16 overflows on DeepSeek's activations: vLLM refuses it with this list.
        return [torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Ue8m0Config:
        global _warned
        warning = compat.version_warning()
        if warning and not _warned:
            logger.warning(warning)
            _warned = True
        return cls(QuantSpec.from_hf_config(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """vLLM asks this of every model; anything but None takes the model over."""
        declared = hf_quant_cfg.get("quant_method")
        if user_quant != NAME and not (user_quant is None and declared == NAME):
            return None
        check_model_type(getattr(hf_config, "model_type", None))
        QuantSpec.from_hf_config(hf_quant_cfg)  # raises with the reason, before anything is loaded
        return NAME

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **kwargs: Any
    ) -> None:
        """Check a local checkpoint's headers before any weight is read."""
        check_local_checkpoint(model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.ignored_layers = hf_to_vllm_mapper.apply_list(self.ignored_layers)

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """The method of a layer; None leaves embeddings, lm_head and attention to vLLM."""
        self._read_options()
        if isinstance(layer, compat.LinearBase):
            if self._is_ignored(prefix):
                return compat.UnquantizedLinearMethod()
            from .linear import Ue8m0LinearMethod

            self.report.created += 1
            return Ue8m0LinearMethod(self, prefix)
        if isinstance(layer, compat.RoutedExperts):
            if self._is_ignored(prefix):
                return compat.UnquantizedFusedMoEMethod(layer.moe_config)
            from .moe import Ue8m0MoEMethod

            self.report.created += 1
            return Ue8m0MoEMethod(self, layer.moe_config, prefix)
        return None

    def _is_ignored(self, prefix: str) -> bool:
        return bool(
            compat.is_layer_skipped(prefix, self.ignored_layers, self.packed_modules_mapping)
        )

    def _read_options(self) -> None:
        """Merge `--additional-config '{"ue8m0": {...}}'` into the spec, once per process.

        The outcome is written back there, because vLLM's compile key hashes additional_config
        but not a quantization config, and these options change the traced graph.
        """
        if self._options_read:
            return
        self._options_read = True
        config = compat.current_config()
        if config is not None:
            if compat.platform() == "cuda":
                norms.prefer()
            fusion.install()
        additional = getattr(config, "additional_config", None)
        if not isinstance(additional, dict):
            return
        options = additional.get(NAME, {})
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"--additional-config: 'ue8m0' is {options!r}; allowed: an object of options, e.g. "
                '\'{"ue8m0": {"activation_scale": "fp32"}}\'.'
            )
        self.spec = self.spec.with_options(options)
        additional[NAME] = self.spec.options()

    def layer_done(
        self, layer_kind: str, kind: str, finer: bool, device: torch.device,
        *operators: warmup.Operator | None,
    ) -> None:  # fmt: skip
        """Count a processed layer; after the last one, log the summary line and warm up.

        Before vLLM's profile run and graph capture, which launch what they happen to reach one
        kernel after the other; and once: a reload of weights finds everything compiled.
        """
        if self._operators is not None:
            self._operators += [operator for operator in operators if operator is not None]
        if self.report.add(layer_kind, kind, finer):
            from ..dispatch import choose

            logger.info(self.report.line(self.spec, choose("linear", device.type).name))
            noted, self._operators = self._operators or [], None
            warmup.run(noted, lambda line: logger.info("ue8m0: %s", line))


def register_method() -> None:
    """Make the name known to vLLM; safe to call again."""
    compat.register_quantization_config(NAME)(Ue8m0Config)
    norms.register()
