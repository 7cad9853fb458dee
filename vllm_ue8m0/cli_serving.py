"""The verbs of `vllm-ue8m0` that are about serving: doctor and eval."""

from __future__ import annotations

import argparse
import json

from .cli_values import positive
from .evaluate import CONTEXT, TOP_K


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="also say how this checkpoint directory is served"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def doctor(options: argparse.Namespace) -> int:
    from .doctor import report

    found = report.examine(options.model)
    print(json.dumps(found.to_json()) if options.json else report.text(found))
    return 0 if found.works else 1


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
