"""Every command line in README.md and docs/ is one: parsed by the program that it is for.

Every link within the project leads somewhere, and what README says of messages and environment
variables is what the source has.
"""

import ast
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
    assert verbs == {"convert", "inspect", "verify", "doctor", "eval", "warmup", "bench", "tune"}
    assert len(OURS) > 20 and SERVE and LM_EVAL


@pytest.mark.parametrize(("page", "words"), OURS, ids=map(str, OURS))
def test_ours(page, words):
    options = parse(words)
    if options.verb == "eval" and options.engine:
        check_engine(options.model, options.engine)
    elif options.verb == "warmup":
        check_engine(options.model, [*options.engine, "--quantization", "ue8m0"])


@pytest.mark.parametrize(("page", "words"), SERVE, ids=map(str, SERVE))
def test_vllm_serve(page, words):
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsers = FlexibleArgumentParser().add_subparsers(required=True)
    command = ServeSubcommand()
    options = command.subparser_init(parsers).parse_args(words)
    command.validate(options)
    assert options.model_tag == words[0]
    assert EngineArgs.from_cli_args(options).quantization == "ue8m0"


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


def anchors(page):
    """As GitHub names headings: lower case, hyphens for spaces, no other signs."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links():
    for page in PAGES:
        prose = INLINE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if not target.startswith("http"):
                yield page, target


def test_links_lead_somewhere():
    found = list(links())
    assert len(found) > 20
    for page, target in found:
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), (page.name, target)
        if anchor:
            assert anchor in anchors(there), (page.name, target)


# What vLLM, torch and Python say.
THEIRS = (
    "Quantization method specified",
    "operator torchvision",
    "PackageNotFoundError",
    "torch.float16 is",
    "expect weight to be",
)


def strings():
    """Every literal of the package, and of f-strings what stands between the values."""
    for path in (ROOT / "vllm_ue8m0").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def table(header):
    """First cells of README's table with this header."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = text.split(f"| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [re.match(r"\| `(.*?)` \|", row)[1] for row in rows]


def test_messages_are_ours():
    everything = "\0".join(strings())
    messages = [m for m in table("message") if not m.startswith(THEIRS)]
    assert len(messages) > 3
    for message in messages:
        for part in filter(None, message.split("…")):
            assert part.strip() in everything, message


def test_environment_variables_are_all_there():
    """Those of UE8M0_ and those of others that change what is computed, wherever they are read."""
    read = {text for text in strings() if re.fullmatch(r"(UE8M0|VLLM|TRITON)_[A-Z_]+[A-Z]", text)}
    elsewhere = {"TRITON_CACHE_DIR", "TRITON_HOME"}  # where `doctor` looks, as Triton does
    # What `bench e2e` sets for the vLLM that it starts, vLLM's routing of a benchmark, and what
    # changes when its peer compiles.
    elsewhere |= {
        "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_CACHE_ROOT", "VLLM_NO_USAGE_STATS",
        "VLLM_DEEP_GEMM_WARMUP",
        "VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "VLLM_SERVER_DEV_MODE",
    }  # fmt: skip
    assert set(table("environment variable")) == read - elsewhere
