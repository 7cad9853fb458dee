"""The libraries whose releases have signature files: where those are, and what is read for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .source import Source
from .uses import Found, Object, Use
from .walk import walk

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Library:
    """name: of the package and of its distribution; files: where its signature files are."""

    name: str
    files: Path
    folders: tuple[str, ...]
    objects: Mapping[str, Mapping[str, Object]] = field(default_factory=dict)
    hooks: tuple[str, ...] = ()  # members that it reads of ours, or we of objects of any type
    newest: tuple[str, ...] = ()  # what only newer releases have, the newest in any case

    def found(self) -> Found:
        """What our source takes from it."""
        found = walk(self.name, ROOT, self.folders, self.objects)
        found.uses += [Use("read by the library", (path,)) for path in self.hooks]
        return found

    def releases(self) -> list[str]:
        """Of which there are files, oldest first."""
        names = (path.stem for path in self.files.glob("*.json"))
        return sorted(names, key=lambda release: [int(part) for part in release.split(".")])

    def load(self, release: str) -> dict[str, str | None]:
        """What `release` has, by dotted path."""
        groups = json.loads((self.files / f"{release}.json").read_text("utf-8"))
        return {
            f"{owner}.{name}".lstrip("."): text
            for owner, members in groups.items()
            for name, text in members.items()
        }

    def save(self, release: str, names: Mapping[str, str | None]) -> None:
        """Write the file of a release, by module and class."""
        groups: dict[str, dict[str, str | None]] = {}
        for path, text in sorted(names.items()):
            owner, _, name = path.rpartition(".")
            groups.setdefault(owner, {})[name] = text
        self.files.mkdir(parents=True, exist_ok=True)
        text = json.dumps(groups, indent=1, sort_keys=True)
        (self.files / f"{release}.json").write_text(f"{text}\n", "utf-8")

    def record(self, source: Source, found: Found) -> dict[str, str | None]:
        """What `source` has of everything that was found in ours.

        Of the classes that ours extend ("whole"), all members; of others, what is used.
        """
        paths = {path for use in found.uses for path in use.paths} | set(self.newest)
        for use in found.uses:
            for path in use.paths if use.call is not None else ():
                if (source.describe(path) or "").endswith("class"):
                    paths.add(f"{path}.__init__")
        whole = {base for own in found.classes for base in own.base if source.describe(base)}
        paths |= {f"{base}.{name}" for base in whole for name in source.members(base)}
        owners = {path.rpartition(".")[0] for path in paths} - {""}
        paths |= {owner for owner in owners if (source.describe(owner) or "").endswith("class")}
        names = {p: source.describe(p) for p in sorted(paths) if not source.is_inside_value(p)}
        return names | {base: f"whole {names[base]}" for base in whole}


_MODEL_EXECUTOR = "vllm.model_executor"
_MOE = f"{_MODEL_EXECUTOR}.layers.fused_moe"
_EXPERTS_LAYER = Object(
    f"{_MOE}.RoutedExperts",
    ours=("weight", "w13_", "w2_", "orig_dtype", "num_experts", "register_parameter"),
)

VLLM = Library(
    "vllm",
    ROOT / "tests/plugin/signatures",
    ("vllm_ue8m0", "examples"),
    {
        "vllm_ue8m0/plugin/compat.py": {
            "config": Object("vllm.config.VllmConfig"),
            "config.compilation_config": Object("vllm.config.CompilationConfig"),
            "current_platform": Object("vllm.platforms.Platform"),
            "layer": _EXPERTS_LAYER,
        },
        "vllm_ue8m0/plugin/config.py": {
            "config": Object("vllm.config.VllmConfig"),
            "hf_to_vllm_mapper": Object(f"{_MODEL_EXECUTOR}.models.utils.WeightsMapper"),
            "layer": _EXPERTS_LAYER,
        },
        "vllm_ue8m0/plugin/experts.py": {
            "expert_tokens_meta": Object(f"{_MOE}.modular_kernel.ExpertTokensMetadata"),
        },
        "vllm_ue8m0/plugin/loading.py": {
            "config": Object("vllm.config.VllmConfig"),
            "config.load_config": Object("vllm.config.LoadConfig"),
        },
        "vllm_ue8m0/plugin/moe.py": {
            "cls": Object(f"{_MOE}.modular_kernel.FusedMoEExpertsModular"),
            "config": Object(f"{_MOE}.config.FusedMoEQuantConfig", ours=("ue8m0",)),
            "layer": _EXPERTS_LAYER,
            "prepare_finalize": Object(f"{_MOE}.modular_kernel.FusedMoEPrepareAndFinalizeModular"),
            "self.moe": Object(f"{_MOE}.config.FusedMoEConfig"),
            "self.moe.moe_parallel_config": Object(f"{_MOE}.config.FusedMoEParallelConfig"),
            "self.moe_kernel": Object(f"{_MOE}.modular_kernel.FusedMoEKernel"),
        },
        "vllm_ue8m0/evaluate/recorder.py": {
            "config": Object("vllm.config.ModelConfig"),
            "engine": Object("vllm.engine.arg_utils.EngineArgs"),
            "flat": Object("vllm.logprobs.FlatLogprobs"),
            "llm": Object("vllm.LLM"),
            "output": Object("vllm.outputs.RequestOutput"),
        },
        "vllm_ue8m0/bench/gemm_peers.py": {
            "loaded(_load_triton)": Object(
                f"{_MODEL_EXECUTOR}.layers.quantization.utils.fp8_utils.w8a8_triton_block_scaled_mm"
            ),
        },
        "vllm_ue8m0/bench/moe_peers.py": {
            "build(experts_class, num_experts, t)": Object(f"{_MOE}.modular_kernel.FusedMoEKernel"),
            "classes[experts_class]": Object(f"{_MOE}.modular_kernel.FusedMoEExpertsModular"),
        },
        "examples/offline.py": {"llm": Object("vllm.LLM")},
        "examples/generate.py": {"llm": Object("vllm.LLM")},
    },
    hooks=(
        f"{_MOE}.FusedMoEMethodBase.moe_kernel",
        f"{_MOE}.FusedMoEMethodBase.moe_quant_config",
    ),
    newest=(
        f"{_MOE}.config.FusedMoEParallelConfig.use_moonep_kernels",
        f"{_MOE}.config.FusedMoEParallelConfig.use_passthrough_all2all",
    ),
)

_GLUON = "triton.experimental.gluon.language"
_SHARED = Object(f"{_GLUON}.shared_memory_descriptor")
TRITON = Library(
    "triton",
    ROOT / "tests/kernels/signatures",
    ("vllm_ue8m0",),
    {
        "vllm_ue8m0/kernels/hopper.py": {"smem": _SHARED},
        **{
            f"vllm_ue8m0/kernels/{file}.py": dict.fromkeys(names.split(), _SHARED)
            for file, names in (
                ("decode_gemm", "w_smem a_smem as_smem ws_smem ws_each ready"),
                ("prefill_gemm", "w_smem a_smem as_smem out_smem ready empty"),
                ("expert_load", "w_smem a_smem as_smem next_smem codes scales ready empty"),
                ("expert_chain", "w_smem a_smem as_smem ws_smem ws_each ready empty"),
                ("expert_chain_load", "a_smem as_smem next_smem ready empty"),
                ("expert_decode", "w_smem a_smem as_smem ws_smem ws_each scales ready empty"),
                ("expert_prefill", "w_smem a_smem as_smem next_smem scales ready empty"),
            )
        },
    },
    hooks=(  # of kernels/replay.py, which takes any kernel and descriptor
        "triton.compiler.compiler.CompiledKernel.__getitem__",
        "triton.experimental.gluon.nvidia.hopper.TensorDescriptor.base",
        "triton.experimental.gluon.nvidia.hopper.TensorDescriptor.block_shape",
        "triton.runtime.jit.JITFunction.arg_names",
    ),
)
LIBRARIES = {library.name: library for library in (VLLM, TRITON)}
