"""`vllm-ue8m0 doctor`: everything collected, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from . import ask_kernels
from . import facts as facts_module
from . import model as model_module
from .ask_kernels import Checked, Say
from .ask_vllm import Question, StockFp8, Vllm, stock_fp8
from .facts import Facts, Kernel
from .model import Model
from .problems import Problem, find

_LABEL, _WIDTH = 14, 100
_TIE = "\xa0"  # a space at which wrap breaks no line


@dataclass(frozen=True)
class Report:
    """vllm: None if it is not installed. model: None if none was asked about.

    self_test: None if it was left out; empty where no kernels are to be held against plain torch.
    """

    facts: Facts
    vllm: Vllm | None
    stock_fp8: StockFp8
    model: Model | None
    problems: list[Problem]
    self_test: list[Checked] | None = None

    @property
    def works(self) -> bool:
        """Nothing found is broken."""
        return not any(problem.broken for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """The report as `doctor --json` prints it."""
        return {
            "works": self.works,
            "problems": [problem._asdict() for problem in self.problems],
            **asdict(self.facts),
            "vllm": asdict(self.vllm) if self.vllm else None,
            "stock_fp8": self.stock_fp8._asdict(),
            "self_test": None if self.self_test is None else [asdict(c) for c in self.self_test],
            "model": asdict(self.model) if self.model else None,
        }


def examine(directory: str | None = None, self_test: bool = True, say: Say = print) -> Report:
    """Look at this installation, and at one local checkpoint; takes as long as importing vLLM.

    self_test: and run every operator's kernels, which may compile for minutes; `say` gets a line
    for each.
    """
    question = Question()
    facts = facts_module.collect()
    model = model_module.look_at(directory, facts.device) if directory is not None else None
    checked = ask_kernels.ask(ask_kernels.to_check(facts.kernels), say) if self_test else None
    vllm = question.answer()
    capability = facts.gpus[0].capability if facts.gpus else None
    problems = find(facts, vllm, model, checked or ())
    return Report(facts, vllm, stock_fp8(vllm, capability), model, problems, checked)


def text(report: Report) -> str:
    """The report for people: a label a line, then what is wrong."""
    return "\n".join([*_lines(report), "", *_problems(report)])


def _lines(report: Report) -> Iterator[str]:
    facts = report.facts
    versions = {"python": facts.python, **facts.versions}
    yield from _entry("versions", [", ".join(f"{k}{_TIE}{v or '-'}" for k, v in versions.items())])
    yield from _entry("system", [facts.system])
    yield from _entry("GPU", _gpus(facts))
    yield from _entry("vLLM", [_vllm(report)])
    answer, reason = report.stock_fp8
    yield from _entry("vLLM's fp8", [f"UE8M0 activation scales: {answer} ({reason})"])
    yield from _entry("kernels", _kernels(facts.kernels) or ["none can be chosen"])
    yield from _entry("self-test", _self_test(report.self_test))
    cache = facts.triton_cache
    state = "" if cache.writable else "NOT WRITABLE, "
    yield from _entry(
        "Triton cache",
        [
            f"{cache.directory}: {state}{cache.files} files, {cache.num_bytes / 1e6:.1f} MB, "
            f"{cache.free_bytes / 1e9:.0f} GB free"
        ],
    )
    variables = [f"{name}={value}" for name, value in facts.environment.items()]
    yield from _entry("environment", variables or ["nothing that matters is set"])
    if report.model is not None:
        yield from _entry("model", _model(report.model))


def _entry(label: str, paragraphs: Iterable[str]) -> Iterator[str]:
    """Paragraphs beside a label, the later lines of each indented."""
    for paragraph in paragraphs:
        lines = wrap(
            paragraph,
            _WIDTH - _LABEL,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines:
            yield f"{label:<{_LABEL}}{line.replace(_TIE, ' ')}"
            label = ""


def _gpus(facts: Facts) -> list[str]:
    if not facts.gpus:
        return ["none"]
    lines: dict[str, int] = {}
    for gpu in facts.gpus:
        shared = gpu.shared_memory_bytes
        line = f"{gpu.name}, {gpu.capability}, {gpu.sms} SMs, {gpu.memory_bytes / 2**30:.0f} GiB"
        line += f", {shared / 1024:.0f} KiB shared memory" if shared else ""
        lines[line] = lines.get(line, 0) + 1
    return [f"{count} x {line}" for line, count in lines.items()]


def _vllm(report: Report) -> str:
    vllm = report.vllm
    if vllm is None:
        return "not installed"
    if vllm.error is not None:
        return "cannot be imported"
    known = "is" if vllm.registered else "is NOT"
    return f"platform {vllm.platform or 'none'}; the method ue8m0 {known} registered"


def _kernels(kernels: Iterable[Kernel]) -> list[str]:
    """A paragraph for the operators that share a backend and all reasons."""
    by_operator: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        by_operator.setdefault(kernel.operator, []).append(kernel)
    groups: dict[str, list[str]] = {}
    for operator, rows in by_operator.items():
        parts = [f"{row.backend} ({row.reason})" for row in rows if row.status == "chosen"] or [
            "NONE"
        ]
        parts += [f"not {row.backend}: {row.reason}" for row in rows if row.status == "refused"]
        groups.setdefault("; ".join(parts), []).append(operator)
    return [f"{', '.join(operators)}: {outcome}" for outcome, operators in groups.items()]


def _self_test(checked: list[Checked] | None) -> list[str]:
    """A paragraph for the operators of a backend that came out alike."""
    if checked is None:
        return ["left out"]
    if not checked:
        return ["nothing to compare: no kernels of this project run here"]
    groups: dict[tuple[str, str], list[Checked]] = {}
    for one in checked:
        outcome = "as plain torch up to rounding" if one.error is None else "FAILED, see below"
        outcome = "bit for bit as plain torch" if one.bitwise else outcome
        groups.setdefault((one.backend, outcome), []).append(one)
    lines = []
    for (backend, outcome), members in groups.items():
        names = ", ".join(
            one.operator if one.bitwise or one.error else f"{one.operator}{_TIE}({one.diff:.0e})"
            for one in members
        )
        lines.append(f"{backend}, {outcome}: {names}")
    return lines


def _model(model: Model) -> list[str]:
    lines = [model.directory]
    if model.served:
        served = ", ".join(f"{count} {name}" for name, count in model.served.items())
        lines.append(f"tensors: {served}; activation scales {model.activation_scale or '-'}")
    for what, taken, refused in (
        ("linear weights", model.linears, model.refused),
        ("layers of experts", model.experts, model.experts_refused),
    ):
        if taken:
            counts = ", ".join(f"{count} on {name}" for name, count in taken.items())
            lines.append(f"{what} of one rank: {counts}")
        lines += [f"not for {count}: {reason}" for reason, count in refused.items()]
    return lines


def _problems(report: Report) -> Iterator[str]:
    for problem in report.problems:
        yield from _entry("BROKEN" if problem.broken else "note", [problem.found])
        yield from _entry("", [f"-> {problem.do}"])
    count = sum(problem.broken for problem in report.problems)
    yield f"{count} broken" if count else "nothing is broken: --quantization ue8m0 should work here"
