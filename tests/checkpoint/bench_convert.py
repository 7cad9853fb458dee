"""How long `convert` bf16 -> UE8M0 takes beside what it cannot do without.

    python tests/checkpoint/bench_convert.py [--gigabytes 2] [--dir DIR] [--workers N]

The yardstick, for the same bytes and measured in turn with it: `cp`, torch's abs().amax() over
the same blocks, one cast to e4m3. Prints medians of 3 rounds and their ratio; needs three times
the gigabytes on disk, in DIR, and removes what it wrote.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_checkpoints import write_checkpoint

from vllm_ue8m0.checkpoint.convert import convert

# Of DeepSeek-V3: an expert's up and down projection, q_b_proj, o_proj, 0.36 GB together.
SHAPES = ((2048, 7168), (7168, 2048), (24576, 1536), (7168, 16384))


def seconds(run: Callable[[], object]) -> float:
    os.sync()  # what the run before left to write would slow this one down
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--dir", default=tempfile.gettempdir())
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    weights: dict[str, torch.Tensor] = {}
    size = 0
    while size < options.gigabytes * 1e9:
        w = torch.randn(SHAPES[len(weights) % len(SHAPES)]).mul_(0.02).bfloat16()
        weights[f"model.layers.{len(weights)}.mlp.up_proj.weight"] = w
        size += w.nbytes

    def amax() -> None:
        for w in weights.values():
            N, K = w.shape
            w.view(N // 128, 128, K // 128, 128).abs().amax(3).amax(1)  # faster than (1, 3)

    def cast() -> None:
        for w in weights.values():
            w.to(torch.float8_e4m3fn)

    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        source = write_checkpoint(Path(folder, "source"), weights)
        file, copy, target = source / "model.safetensors", Path(folder, "copy"), Path(folder, "to")

        def run_convert() -> None:
            convert(source, target, workers=options.workers)

        runs: dict[str, Callable[[], object]] = {
            "cp": lambda: subprocess.run(["cp", file, copy], check=True),
            "abs().amax()": amax,
            "cast to e4m3": cast,
            "convert": run_convert,
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(3):
            for name, run in runs.items():
                times[name].append(seconds(run))
                copy.unlink(missing_ok=True)
                shutil.rmtree(target, ignore_errors=True)
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(f"{size / 1e9:.2f} GB, {torch.get_num_threads()} torch threads, medians of 3:")
    for name, found in times.items():
        rounds = ", ".join(f"{value:.2f}" for value in found)
        print(
            f"  {name:13}{medians[name]:7.2f} s {size / medians[name] / 1e9:6.2f} GB/s ({rounds})"
        )
    ratio = medians["convert"] / (sum(medians.values()) - medians["convert"])
    print(f"  convert / (cp + amax + cast) = {ratio:.2f} (aim: at most 1.4)")


if __name__ == "__main__":
    main()
