"""Whether every release has what our source takes from it, from files: nothing is installed."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.signatures.check import problems
from tools.signatures.libraries import LIBRARIES, ROOT, VLLM
from tools.signatures.source import Source
from tools.signatures.tables import README, with_tables

FOUND = {name: library.found() for name, library in LIBRARIES.items()}
RELEASES = [
    (name, release) for name, library in LIBRARIES.items() for release in library.releases()
]


@pytest.mark.parametrize(("name", "release"), RELEASES)
def test_release_has_what_we_need(name, release):
    lines = problems(FOUND[name], f"{name} {release}", LIBRARIES[name].load(release))
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_object_that_is_declared_is_met(name):
    assert not FOUND[name].unused_objects, "libraries.py names expressions that are nowhere"


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=list(LIBRARIES))
def test_newest_release_has_what_older_ones_may_lack(library):
    names = library.load(library.releases()[-1])
    assert all(names[path] is not None for path in library.newest)


def test_files_cover_the_releases_that_are_accepted():
    tree = ast.parse((ROOT / "vllm_ue8m0/plugin/compat.py").read_text("utf-8"))
    (low, high), *_ = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TESTED"
    )
    minors = {tuple(int(part) for part in release.split(".")[:2]) for release in VLLM.releases()}
    assert minors == {(0, minor) for minor in range(low[1], high[1] + 1)}
    accepted = f"vllm>={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}"
    assert f'"{accepted}"' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'"{accepted}"' in (ROOT / "tools/setup.sh").read_text("utf-8")


def test_files_are_small():
    files = [path for library in LIBRARIES.values() for path in library.files.glob("*.json")]
    assert sum(path.stat().st_size for path in files) < 300_000


def test_tables_in_readme_are_those_of_the_files():
    text = README.read_text("utf-8")
    assert text == with_tables(text), "python -m tools.signatures tables"


@pytest.fixture(params=LIBRARIES)
def installed(request):
    """(library, release) of what is installed here."""
    library = LIBRARIES[request.param]
    release = pytest.importorskip(library.name).__version__.split("+")[0]
    if release not in library.releases():
        pytest.skip(f"there is no signature file of {library.name} {release}")
    return library, release


def test_file_is_that_of_the_installed_release(installed):
    library, release = installed
    folder = Path(importlib.import_module(library.name).__file__).parent
    source = Source.from_directory(library.name, folder)
    assert library.record(source, FOUND[library.name]) == library.load(release)


def test_installed_release_is_as_its_file_says(installed):
    library, release = installed
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, Path(__file__).with_name("installed.py"), library.name, release]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert int(run.stdout.split()[-1]) > 50, run.stdout


def test_names_of_releases_are_versions():
    for _, release in RELEASES:
        assert re.fullmatch(r"\d+\.\d+\.\d+", release)
