"""What other processes compile is what launches find; in a process without the interpreter."""

import os
import sys
import tempfile
from functools import cache
from pathlib import Path

from offline_compiler import empty, report


@cache
def results():
    return report(__file__)


def test_recording_compiles_and_launches_nothing():
    assert results()["recorded"] == "_act_quant_kernel _decode_gemm_kernel _prefill_gemm_kernel"
    assert results()["cached before"] == "0"


def test_launches_find_what_was_compiled_ahead():
    assert results()["compiled"] == "3 steps, 0 errors"
    assert results()["launched before"] == "3 compiled"
    assert results()["launched after"] == "0 compiled"


def test_what_cannot_be_compiled_is_said():
    assert "_no_kernel" in results()["broken"] and "AttributeError" in results()["broken"]


def main() -> None:
    from triton import knobs
    from triton.runtime import driver
    from triton.runtime.jit import KernelInterface

    from vllm_ue8m0.kernels import (
        act_quant,
        config,
        decode_gemm,
        precompile,
        prefill_gemm,
        replay,
    )
    from vllm_ue8m0.kernels.hopper_config import DecodeConfig, PrefillConfig

    gpu = precompile._NoGpu(90)
    gpu.get_current_stream = lambda device: 0
    driver.set_active(gpu)
    act_quant.dependent_launch = lambda device: {"PDL": True, "launch_pdl": True}
    M, N, K = 64, 256, 512

    def launches() -> None:
        x, w = empty(1, M, K, dtype="bf16"), empty(N, K, dtype="e4m3")
        q, s = empty(1, M, K, dtype="e4m3"), empty(K // 128, M, dtype="u8").mT
        sf, out = empty(N // 128, K // 128, dtype="u8"), empty(M, N, dtype="bf16")
        act_quant.launch(x, q, s[None], 128, 105, True, config.TileConfig(1, 4, 1))
        decode = DecodeConfig(64, 64, 2, 1, 4)
        decode_gemm.launch(q[0], s, w, sf, None, None, out, decode, None, True, 105)
        prefill_gemm.launch(q[0], s, w, sf, None, None, out, PrefillConfig(128, 64, 4), None, 132)

    with tempfile.TemporaryDirectory() as cold, tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        with precompile.recording() as kernels:
            launches()
            launches()
        print("recorded:", *sorted(kernel.name for kernel in kernels))
        KernelInterface.__getitem__ = lambda self, grid: (
            lambda *args, **options: self.run(*args, grid=grid, warmup=True, **options)
        )

        def compiled_by_launches(where: str) -> int:
            knobs.cache.dir = where
            for module in (act_quant, decode_gemm, prefill_gemm):
                for value in vars(module).values():
                    if hasattr(value, "device_caches"):
                        value.device_caches.clear()
            with precompile.compilations() as names, replay.off():
                launches()
            return len(names)

        print("cached before:", len(list(Path(folder).iterdir())))
        steps = []
        errors = precompile.precompile(kernels, 90, 2, lambda: steps.append(1))
        print(f"compiled: {len(steps)} steps, {len(errors)} errors", *errors)
        print("launched before:", compiled_by_launches(cold), "compiled")
        print("launched after:", compiled_by_launches(folder), "compiled")
        broken = kernels[0]._replace(name="_no_kernel")
        print("broken:", *precompile.precompile([broken], 90, 2, lambda: None))


if __name__ == "__main__":
    sys.exit(main())
