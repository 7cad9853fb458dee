"""`vllm-ue8m0 bench e2e`: its options."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .bench import E2E_BENCHES, E2E_SIDES
from .cli_values import positive, rate


def e2e_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--only", nargs="+", choices=E2E_BENCHES, default=[], metavar="NAME",
        help=", ".join(E2E_BENCHES))  # fmt: skip
    add("--side", nargs="+", choices=E2E_SIDES, default=[], metavar="SIDE",
        help=f"{', '.join(E2E_SIDES)}; with --out, a later run adds the other")  # fmt: skip
    add("--out", metavar="FILE.jsonl",
        help="write one JSON record per line; FILE.jsonl.SIDE.json keeps the rest")  # fmt: skip
    add("--caches", metavar="DIR", help="keep compiled kernels here, for a later start_warm")
    add("--model", metavar="DIR", help="another config.json (default: DeepSeek-V3.1's)")
    add("--layers", type=positive, metavar="N", help="the first of them dense (default: 5)")
    add("--tensor-parallel-size", type=positive, dest="tp", metavar="N", help="GPUs (default: 1)")
    add("--batch", type=positive, nargs="+", dest="batches", metavar="N",
        help="of decode_step (default: 1 16 64 256)")  # fmt: skip
    add("--context", type=positive, metavar="N",
        help="tokens of decode_step's prompts (default: 256)")  # fmt: skip
    add("--rate", type=rate, nargs="+", dest="rates", metavar="R",
        help="requests a second of serve (default: 2 32)")  # fmt: skip
    add(
        "--routing",
        choices=("uniform_random", "router"),
        help="of tokens to experts: simulated (default), or by the router of random weights",
    )
    add("--engine", type=_arguments, metavar="JSON",
        help="""more arguments of vLLM's LLM, e.g. '{"kv_cache_dtype": "fp8"}'""")  # fmt: skip


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not an object of arguments.")
    return value


def e2e(options: argparse.Namespace) -> None:
    from .bench import command

    engine = None if options.engine is None else tuple(sorted(options.engine.items()))
    setup = {
        "model": options.model,
        "layers": options.layers,
        "tp": options.tp,
        "batches": None if options.batches is None else tuple(options.batches),
        "context": options.context,
        "rates": None if options.rates is None else tuple(options.rates),
        "routing": options.routing,
        "engine": engine,
    }
    command.e2e(options.only, options.side, options.out, options.caches, setup)
