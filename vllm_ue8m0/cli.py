"""`vllm-ue8m0 VERB ...`: the command line. Each verb imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from . import __version__, cli_bench, cli_serving, cli_values
from .bench import GEMM_BENCHES, MOE_LAYERS, QUANT_OPS, BenchError
from .checkpoint.shards import CheckpointError
from .evaluate import EvalError
from .formats import ConfigError

Options = argparse.Namespace


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="directory of a safetensors checkpoint")
    parser.add_argument("dst", metavar="DST", help="new, empty, or of an interrupted conversion")
    parser.add_argument("--to", choices=("ue8m0", "bf16", "fp32-scales"), default="ue8m0")
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
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="round weights a second time where scales are not powers of two (refused otherwise)",
    )
    parser.add_argument(
        "--max-memory",
        type=cli_values.size,
        metavar="BYTES",
        help="what the process may grow by, e.g. 500MB; limits the workers (default: 2GiB)",
    )
    parser.add_argument(
        "--workers", type=cli_values.positive, metavar="N", help="threads (default: one per core)"
    )


def _convert(options: Options) -> None:
    from .checkpoint.convert import DEFAULT_IGNORE, convert
    from .checkpoint.writer import Progress

    try:
        summary = convert(
            options.src,
            options.dst,
            to=options.to,
            scale_dtype=options.scale_dtype,
            quant_method=options.quant_method,
            ignore=(*DEFAULT_IGNORE, *options.ignore),
            progress=Progress(),
            requantize=options.requantize,
            workers=options.workers,
            max_memory=options.max_memory,
        )
    except KeyboardInterrupt:
        print("\nThe same command continues where this one stopped.", file=sys.stderr)
        raise
    print(
        f"{options.dst}: {summary.converted} tensors converted, {summary.copied} copied, "
        f"{summary.bytes_read / 1e9:.2f} GB -> {summary.bytes_written / 1e9:.2f} GB"
    )
    if summary.errors:
        worst = max(summary.errors, key=lambda name: summary.errors[name])
        print(
            f"{len(summary.errors)} of them requantized, relative error at most "
            f"{summary.errors[worst]:.2%} ({worst})"
        )


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="directory of a safetensors checkpoint")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON, for programs")
    shown.add_argument("--all", action="store_true", help="list every tensor and every problem")
    parser.add_argument(
        "--plot", metavar="FILE.svg", help="draw the scales' exponents: .svg, .png or .pdf"
    )


def _inspect(options: Options) -> int:
    from .checkpoint import plot, show
    from .checkpoint.inspect import inspect

    if options.plot is not None:
        plot.check(options.plot)
    report = inspect(options.directory)
    if options.json:
        json.dump(report.to_json(), sys.stdout)
        print()
    else:
        print(show.text(report, options.all))
    if options.plot is not None:
        plot.save(report, options.plot)
    return 0 if report.servable else 1


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="directory of a safetensors checkpoint")
    parser.add_argument("b", metavar="B", help="another, in whatever format")
    parser.add_argument(
        "--tolerance",
        type=cli_values.tolerance,
        default=0.0,
        metavar="R",
        help="accept a relative (Frobenius) error of at most R in every tensor",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON, for programs")
    shown.add_argument("--all", action="store_true", help="list every tensor")


def _verify(options: Options) -> int:
    from .checkpoint.verify import text, verify
    from .checkpoint.writer import Progress

    found = verify(options.a, options.b, options.tolerance, Progress())
    if options.json:
        json.dump(found.to_json(), sys.stdout)
        print()
    else:
        print(text(found, options.all))
    return 0 if found.passed else 1


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="benchmark", metavar="WHAT", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text)

    quant = add("quant", "time the quantizers on this machine's GPU, beside vLLM's and a copy")
    gemm = add("gemm", "time the dense products on this machine's GPU, beside DeepGEMM and others")
    moe = add("moe", "time DeepSeek-V3's routed experts on this machine's GPU, beside vLLM's")
    for measured, names in ((quant, QUANT_OPS), (gemm, GEMM_BENCHES), (moe, MOE_LAYERS)):
        measured.add_argument(
            "--only", nargs="+", choices=names, default=[], metavar="NAME", help=", ".join(names)
        )
        measured.add_argument("--quick", action="store_true", help="a small and a large case each")
        measured.add_argument(
            "--out",
            metavar="FILE.jsonl",
            help="write one JSON record per line; FILE.jsonl.partial until the last is measured",
        )
        measured.add_argument("--plot", metavar="FILE.svg", help="draw: .svg, .png or .pdf")
    cli_bench.e2e_arguments(add("e2e", "time serving on this machine's GPUs, beside vLLM's fp8"))
    moe.add_argument(
        "--tokens", nargs="+", type=cli_values.positive, default=[], metavar="M",
        help="of a layer, e.g. 48 96, instead of 1 to 8192",
    )  # fmt: skip
    _add_shapes(gemm, "weights to multiply by, e.g. 7168,2048, instead of DeepSeek-V3's")
    show = add("show", "print the table of recorded results; needs no GPU")
    plot = add("plot", "draw recorded results; needs no GPU")
    for recorded in (show, plot):
        recorded.add_argument("records", metavar="FILE.jsonl", help="what --out wrote")
    plot.add_argument("picture", metavar="FILE.svg", help=".svg, .png or .pdf")


def _add_shapes(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--shape", nargs="+", type=cli_values.shape, default=[], metavar="N,K", help=text
    )


def _bench(options: Options) -> None:
    from .bench import command

    if options.benchmark == "quant":
        command.quant(options.only, options.quick, options.out, options.plot)
    elif options.benchmark == "gemm":
        command.gemm(options.only, options.quick, options.shape, options.out, options.plot)
    elif options.benchmark == "moe":
        command.moe(options.only, options.quick, options.tokens, options.out, options.plot)
    elif options.benchmark == "e2e":
        cli_bench.e2e(options)
    elif options.benchmark == "show":
        command.show(options.records)
    else:
        command.draw(options.records, options.picture)


def _tune_arguments(parser: argparse.ArgumentParser) -> None:
    _add_shapes(parser, "weights to tune for, e.g. 7168,2048, instead of DeepSeek-V3's")
    parser.add_argument(
        "--out", metavar="FILE.json", help="write or amend this table, not the installed one"
    )
    parser.add_argument(
        "--rounds", type=cli_values.positive, metavar="N", help="how often each is timed"
    )
    parser.add_argument(
        "--workers",
        type=cli_values.positive,
        metavar="N",
        help="compiling processes (default: 1 per core)",
    )


def _tune(options: Options) -> None:
    from .bench import command

    command.tune(options.shape, options.out, options.rounds, options.workers)


Verb = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[Options], int | None]]
VERBS: dict[str, Verb] = {
    "inspect": ("say what a checkpoint holds and how it is served", _inspect_arguments, _inspect),
    "convert": ("write a checkpoint in another format", _convert_arguments, _convert),
    "verify": ("compare the values of two checkpoints", _verify_arguments, _verify),
    "doctor": (
        "say what is installed, which kernels it would use, and what is wrong",
        cli_serving.doctor_arguments,
        cli_serving.doctor,
    ),
    "eval": (
        "compare what a served model predicts with what another does",
        cli_serving.eval_arguments,
        cli_serving.evaluate,
    ),
    "warmup": (
        "compile all that serving a model takes, ahead of the first start",
        cli_serving.warmup_arguments,
        cli_serving.warm_up,
    ),
    "bench": ("time the operators, show and plot results", _bench_arguments, _bench),
    "tune": ("find the fastest products for this machine's GPU (sm_90)", _tune_arguments, _tune),
}


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line, without the program's name; SystemExit 2 if it has errors."""
    parser = argparse.ArgumentParser(prog="vllm-ue8m0", description="Block FP8 with UE8M0 scales.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (text, add_arguments, _) in VERBS.items():
        add_arguments(verbs.add_parser(name, help=text, description=text))
    engine: list[str] = []
    arguments = list(arguments)
    if arguments[:1] == ["eval"] and "--" in arguments:  # what follows is vLLM's to parse
        end = arguments.index("--")
        arguments, engine = arguments[:end], arguments[end + 1 :]
    elif arguments[:1] == ["warmup"]:
        arguments, engine = arguments[:2], arguments[2:]
    return parser.parse_args(arguments, argparse.Namespace(engine=engine))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 (no, or an error on stderr), 2 (usage), 130."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        status = VERBS[options.verb][2](options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Who reads the output, such as `head`, has seen enough: nothing is to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConfigError, CheckpointError, BenchError, EvalError, OSError) as error:
        print(f"vllm-ue8m0 {options.verb}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nvllm-ue8m0 {options.verb}: interrupted", file=sys.stderr)
        return 130
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
