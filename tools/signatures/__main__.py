"""The command line of the package's docstring."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from . import __doc__ as description
from .check import problems
from .libraries import LIBRARIES, Library
from .source import Source
from .tables import write_tables


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.signatures",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=[*LIBRARIES, "tables"])
    parser.add_argument("releases", nargs="*", metavar="RELEASE")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="where wheels are and stay")
    options = parser.parse_args()
    if options.what == "tables":
        write_tables()
        return 0
    library = LIBRARIES[options.what]
    with tempfile.TemporaryDirectory() as folder:
        wheels = options.wheels or Path(folder)
        lines = [
            line
            for release in options.releases or library.releases()
            for line in read_release(library, release, wheels)
        ]
    print("\n".join(lines) or "nothing is wrong")
    return int(bool(lines))


def read_release(library: Library, release: str, wheels: Path) -> list[str]:
    """Write the file of a release; returns what is wrong with it for our source."""
    found = library.found()
    wheel = fetch(library.name, release, wheels)
    names = library.record(Source.from_wheel(library.name, wheel), found)
    library.save(release, names)
    print(f"{library.name} {release}: {len(names)} names", file=sys.stderr)
    return problems(found, f"{library.name} {release}", names)


def fetch(distribution: str, release: str, wheels: Path) -> Path:
    """The release's wheel in `wheels`, downloaded if it is not there."""
    pattern = f"{distribution}-{release}-*.whl"
    if not any(wheels.glob(pattern)):
        # Whatever Python it is for: nothing of it runs.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--ignore-requires-python", "--dest", str(wheels)]
        subprocess.run([*command, f"{distribution}=={release}"], check=True)
    return next(wheels.glob(pattern))


if __name__ == "__main__":
    sys.exit(main())
