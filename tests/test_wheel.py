"""The wheel: what is in it, and that it works where the repository is not. Needs no network."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath

import pytest

from vllm_ue8m0 import __version__

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "tests/fixtures/tiny_deepseek"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def run(*command, cwd, **environment):
    """Standard output of a command that succeeds."""
    done = subprocess.run(
        [*map(str, command)],
        env=os.environ | {"PYTHONPATH": ""} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: setuptools would pack what an earlier build left in `build/` too."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("vllm_ue8m0", "tests", "tools", "examples", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    """A folder with the wheel and nothing else, before what the environment has."""
    target = wheel.parent / "installed"
    run(*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=wheel.parent)
    return target


def ours(installed, *arguments):
    command = installed / "bin/vllm-ue8m0"
    return run(command, *arguments, cwd=installed.parent, PYTHONPATH=str(installed))


def test_contents(wheel):
    names = {PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.parts[0] for name in names} == {
        "vllm_ue8m0",
        f"vllm_ue8m0-{__version__}.dist-info",
    }
    package = {str(name) for name in names if name.parts[0] == "vllm_ue8m0"}
    sources = [p for p in (ROOT / "vllm_ue8m0").rglob("*") if p.suffix in (".py", ".json")]
    sources.append(ROOT / "vllm_ue8m0/py.typed")
    assert package == {str(path.relative_to(ROOT)) for path in sources}
    assert any(name.match("tuned/*.json") for name in names)
    assert any(name.match("*.dist-info/licenses/LICENSE") for name in names)


def test_entry_points(installed):
    """What vLLM and pip read, and that the plugin's can be loaded without vLLM."""
    (found,) = (d for d in distributions(path=[str(installed)]) if d.name == "vllm_ue8m0")
    assert {(e.group, e.name, e.value) for e in found.entry_points} == {
        ("vllm.general_plugins", "ue8m0", "vllm_ue8m0.plugin:register"),
        ("console_scripts", "vllm-ue8m0", "vllm_ue8m0.cli:main"),
    }
    code = "import sys; from vllm_ue8m0.plugin import register; assert 'vllm' not in sys.modules"
    run(sys.executable, "-c", code, cwd=installed.parent, PYTHONPATH=str(installed))


def test_command(installed):
    assert ours(installed, "--version") == f"vllm-ue8m0 {__version__}\n"
    assert "inspect" in ours(installed, "--help")
    found = json.loads(ours(installed, "inspect", FIXTURE, "--json"))
    assert found["servable"] is True and found["problems"] == []


def test_doctor(installed):
    """Its verdict is that of the machine; a machine where nothing works still gets a report."""
    command = (installed / "bin/vllm-ue8m0", "doctor", "--json")
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [*map(str, command)], env=environment, cwd=installed.parent, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    assert done.returncode == (0 if found["works"] else 1), done.stderr
    assert found["entry_point"] is True and found["versions"]["vllm_ue8m0"] == __version__


def test_it_is_the_wheel_that_runs(installed):
    """An editable installation of this repository stands behind it on the path."""
    code = (
        "import vllm_ue8m0; from vllm_ue8m0.kernels.hopper_config import TABLES;"
        "print(vllm_ue8m0.__file__, *TABLES.glob('*.json'), sep='\\n')"
    )
    out = run(sys.executable, "-c", code, cwd=installed.parent, PYTHONPATH=str(installed))
    paths = [Path(line) for line in out.splitlines()]
    assert len(paths) > 1 and all(path.is_relative_to(installed) for path in paths)
