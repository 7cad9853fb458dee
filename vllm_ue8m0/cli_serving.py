"""The verbs of `vllm-ue8m0` that are about serving: doctor, eval and warmup."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .cli_values import positive
from .evaluate import CONTEXT, TOP_K

STDERR = 2  # the file descriptor; sys.stderr may be something else


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="also say how this checkpoint directory is served"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "--no-self-test",
        action="store_false",
        dest="self_test",
        help="do not run this project's kernels, which takes up to minutes the first time",
    )


def doctor(options: argparse.Namespace) -> int:
    from .doctor import report

    found = report.examine(options.model, options.self_test, _say)
    print(json.dumps(found.to_json()) if options.json else report.text(found))
    return 0 if found.works else 1


def _say(line: str) -> None:
    print(f"vllm-ue8m0 doctor: {line}", file=sys.stderr)


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s MODEL [options] [-- vLLM options]"
    parser.epilog = (
        "Everything behind -- is for vLLM, as in `vllm serve`: -- --quantization ue8m0 "
        "--tensor-parallel-size 8"
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint directory, a model's name, or a recording"
    )
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="UTF-8, to predict")
    parser.add_argument(
        "--reference", metavar="RECORDING.npz", help="compare with what --out wrote, on its text"
    )
    parser.add_argument("--out", metavar="RECORDING.npz", help="keep what MODEL predicted")
    parser.add_argument(
        "--top-k",
        type=positive,
        metavar="K",
        help=f"tokens kept at each position (default: {TOP_K}); more give a KL closer to the full",
    )
    parser.add_argument(
        "--context",
        type=_context,
        metavar="N",
        help=f"tokens of a window (default: {CONTEXT}, or as many as the model takes)",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def _context(text: str) -> int:
    if positive(text) == 1:
        raise argparse.ArgumentTypeError("a window of 1 token predicts nothing.")
    return int(text)


def evaluate(options: argparse.Namespace) -> None:
    from .evaluate import command

    command.evaluate(
        options.model,
        options.text,
        options.reference,
        options.out,
        options.top_k,
        options.context,
        options.engine,
        options.json,
    )


def warmup_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s MODEL [vLLM options]"
    parser.epilog = (
        "Everything behind MODEL is for vLLM, as in `vllm serve`: give what the server will get, "
        "e.g. --tensor-parallel-size 8. Without weights: --load-format dummy."
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, or a model's name")


def warm_up(options: argparse.Namespace) -> int:
    """Start vLLM once, so that what it compiles and what we do is on disk for the next start."""
    from .doctor.facts import triton_cache_directory

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vllm-ue8m0-warmup-") as folder:
        done = Path(folder, "done")
        program = [sys.executable, "-m", f"{__package__}.start", str(done)]
        # The file says whether the model started: vLLM's CPU build sometimes aborts at exit.
        program += [options.model, *options.engine]
        status = subprocess.run(program, stdout=STDERR, check=False).returncode
        reason = done.read_text(encoding="utf-8") if done.exists() else None
    if reason is None:
        reason = f"vLLM ended with status {status} before {options.model} was ready; see above"
    if reason:
        print(f"vllm-ue8m0 warmup: {reason}", file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    print(f"{options.model} is warmed up, {seconds:.0f} s. What the next start needs is in")
    print(f"  {triton_cache_directory(os.environ)}")
    print(f"  {os.environ.get('VLLM_CACHE_ROOT', Path.home() / '.cache' / 'vllm')}")
    return 0
