"""Every command line in README.md and docs/ is one: parsed by the program that it is for."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from vllm_ue8m0.cli import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def commands(program):
    """(page, words behind the program's name) of every command line, in blocks and in sentences."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = "\n".join(FENCED.findall(text)).replace("\\\n", " ").splitlines()
        # In a sentence, a verb alone is a name.
        lines += [c for c in INLINE.findall(FENCED.sub("", text)) if len(c.split()) > 2]
        for line in lines:
            if not line.startswith(f"{program} "):
                continue
            words = shlex.split(line.replace(" ...", ""), comments=True)
            words = [word for word in words if not word.startswith((">", "|"))]
            yield page.relative_to(ROOT), words[len(program.split()) :]


OURS = list(commands("vllm-ue8m0"))
SERVE = list(commands("vllm serve"))
LM_EVAL = list(commands("lm_eval"))


def test_there_are_some():
    verbs = {words[0] for _, words in OURS}
    assert verbs == {"convert", "inspect", "verify", "doctor", "eval", "bench", "tune"}
    assert len(OURS) > 20 and SERVE and LM_EVAL


@pytest.mark.parametrize(("page", "words"), OURS, ids=map(str, OURS))
def test_ours(page, words):
    options = parse(words)
    if options.verb == "eval" and options.engine:
        check_engine(options.model, options.engine)


@pytest.mark.parametrize(("page", "words"), SERVE, ids=map(str, SERVE))
def test_vllm_serve(page, words):
    check_engine(words[0], words[1:])


def check_engine(model, arguments):
    pytest.importorskip("vllm")
    from vllm_ue8m0.evaluate.recorder import engine_args

    assert engine_args(model, arguments).quantization == "ue8m0"


@pytest.mark.parametrize(("page", "words"), LM_EVAL, ids=map(str, LM_EVAL))
def test_lm_eval(page, words):
    """Its model_args are options of vLLM's, and lm-eval, where it is installed, takes the line."""
    given = words[words.index("--model_args") + 1]
    keys = {item.split("=")[0] for item in given.split(",")} - {"pretrained"}
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs

    assert keys <= {field.name for field in dataclasses.fields(EngineArgs)}
    cli = pytest.importorskip("lm_eval._cli")
    options = cli.HarnessCLI()._parser.parse_args(["run", *words])  # "run" goes without saying
    assert options.model == "vllm" and options.model_args["quantization"] == "ue8m0"


def test_a_wrong_line_would_be_seen():
    with pytest.raises(SystemExit):
        parse(["convert", "SRC", "--to", "fp8"])
