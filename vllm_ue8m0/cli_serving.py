"""The verbs of `vllm-ue8m0` that are about serving: doctor."""

from __future__ import annotations

import argparse
import json


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
