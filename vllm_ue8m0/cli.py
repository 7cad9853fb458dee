"""`vllm-ue8m0 VERB ...`: the command line. Each verb imports what it needs when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from . import __version__
from .checkpoint.shards import CheckpointError
from .formats import ConfigError

Options = argparse.Namespace


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="directory of a safetensors checkpoint")
    parser.add_argument("dst", metavar="DST", help="new or empty directory")
    parser.add_argument("--to", choices=("ue8m0", "bf16"), default="ue8m0")
    parser.add_argument(
        "--scale-dtype",
        choices=("float32", "uint8", "float8_e8m0fnu"),
        default="float32",
        help="how scales are stored; float32 is what other tools read too (default)",
    )
    parser.add_argument(
        "--quant-method",
        choices=("fp8", "ue8m0"),
        default="fp8",
        help="quant_method in config.json; with ue8m0, vLLM needs no --quantization flag",
    )
    parser.add_argument(
        "--ignore",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="modules to leave unquantized besides heads, embeddings and routers, e.g. '*.o_proj'",
    )


def _convert(options: Options) -> None:
    from .checkpoint.convert import DEFAULT_IGNORE, convert
    from .checkpoint.writer import Progress

    summary = convert(
        options.src,
        options.dst,
        to=options.to,
        scale_dtype=options.scale_dtype,
        quant_method=options.quant_method,
        ignore=(*DEFAULT_IGNORE, *options.ignore),
        progress=Progress(),
    )
    print(
        f"{options.dst}: {summary.converted} tensors converted, {summary.copied} copied, "
        f"{summary.bytes_read / 1e9:.2f} GB -> {summary.bytes_written / 1e9:.2f} GB"
    )


Verb = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[Options], None]]
VERBS: dict[str, Verb] = {
    "convert": ("write a checkpoint in another format", _convert_arguments, _convert),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 (an error said on stderr), 2 (usage), 130."""
    parser = argparse.ArgumentParser(prog="vllm-ue8m0", description="Block FP8 with UE8M0 scales.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (text, add_arguments, _) in VERBS.items():
        add_arguments(verbs.add_parser(name, help=text, description=text))
    options = parser.parse_args(arguments)
    try:
        VERBS[options.verb][2](options)
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"vllm-ue8m0 {options.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nvllm-ue8m0 {options.verb}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
