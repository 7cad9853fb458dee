"""What every kernel takes on every architecture it serves: compiled/RELEASE.txt, for a Triton each.

`python tests/kernels/recorded_compilation.py` records it for the Triton that is installed, on any
machine. Releases differ: sm_80's products of many rows spill 432 bytes by 3.6 and none by 3.9. By
one release, no byte more may be spilled or shared than is recorded, and SLACK registers more be
used, which a change elsewhere in a kernel may cost.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from offline_compiler import number, report

HERE = Path(__file__).parent
CAPABILITIES = (80, 89, 90, 100, 120)
# Scripts and their arguments.
REPORTS = (
    *(("test_compile.py", capability) for capability in CAPABILITIES),
    ("test_compile_experts.py",),
    ("test_compile_hopper.py", "decode"),
    ("test_compile_hopper.py", "prefill"),
    ("test_compile_hopper.py", "bmm"),
)
SLACK = 8


def table(release):
    return HERE / f"compiled/{release}.txt"


def recorded(release):
    """{"script argument": {name: line}}."""
    sections, section = {}, {}
    for line in table(release).read_text().splitlines():
        if line.startswith("# "):
            section = sections[line.removeprefix("# ")] = {}
        else:
            name, _, text = line.partition(": ")
            section[name] = text
    return sections


def check(script, *arguments):
    """A report is within these limits of what is recorded, on the same tensor cores."""
    release, again = version("triton"), f"`python {Path(*Path(__file__).parts[-3:])}` records them"
    if not table(release).exists():
        pytest.skip(f"no compilations by Triton {release} are recorded; {again}")
    found = report(script, *arguments)
    expected = recorded(release)[" ".join([Path(script).name, *map(str, arguments)])]
    assert found.keys() == expected.keys(), f"{again} anew"
    worse = []
    for name, line in found.items():
        before = expected[name]
        for unit, slack in (("bytes spilled", 0), ("registers", SLACK), ("shared", 0)):
            if number(line, unit) > number(before, unit) + slack:
                worse.append(f"{name}: {number(line, unit)} {unit}, were {number(before, unit)}")
        if products(line) != products(before):
            worse.append(f"{name}: {products(line)}, was {products(before)}")
    assert not worse, "\n".join([*worse, f"If that is meant, {again} anew."])


def products(line):
    """The tensor cores' instructions."""
    return {word for word in line.split() if "mma" in word}


def record():
    with ThreadPoolExecutor(2) as pool:
        reports = [(call, pool.submit(report, HERE / call[0], *call[1:])) for call in REPORTS]
    with table(version("triton")).open("w") as file:
        for call, lines in reports:
            print("#", *call, file=file)
            print(
                *(f"{name}: {line}" for name, line in lines.result().items()), sep="\n", file=file
            )


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    record()
