"""What a source says of its names, held against Python: the same source, imported."""

import importlib
import inspect
import sys

import pytest
from checks import parameters

from tools.signatures.check import parse, without_first
from tools.signatures.source import Source

PACKAGE = {
    "__init__.py": """
from typing import TYPE_CHECKING
from .core import Base as Renamed, helper
from . import core, tools
if TYPE_CHECKING:
    from .core import Late
else:
    def __getattr__(name):
        if name == "Late":
            from .core import Late
            return Late
        raise AttributeError(name)
""",
    "tools.py": """
import functools
from typing import TYPE_CHECKING, overload
from .core import helper as _helper
if TYPE_CHECKING:
    from .core import Late
def wrapped(function):
    return functools.wraps(function)(lambda *a, **k: function(*a, **k))
same = wrapped(_helper)
@overload
def shaped(a: int) -> int: ...
@overload
def shaped(a: str, b: str) -> str: ...
def shaped(a, b=None, /, c=1, *, d, **more): return a
try:
    from nowhere import absent
except ImportError:
    absent = None
if not TYPE_CHECKING:
    here = 1
""",
    "core.py": """
import abc, dataclasses, enum, functools
def helper(a, *rest, b: int = 2): return a
class Late: pass
class Base(abc.ABC):
    field: int = 3
    def __init__(self, first, second=2): self.first = first
    @property
    def size(self): return 1
    @size.setter
    def size(self, value): pass
    @functools.cached_property
    def cached(self): return 1
    @staticmethod
    @abc.abstractmethod
    def make(a): ...
    @classmethod
    def build(cls, b): return cls
    def gone(self, a):
        '''No more.'''
        raise RuntimeError("gone has been removed; call make")
    @abc.abstractmethod
    def must(self): raise NotImplementedError
class Left(Base):
    def must(self): return 1
class Right(Base):
    def __init__(self, right, **kwargs): super().__init__(**kwargs)
    def build(self, other): return 2
class Both(Left, Right): pass
class Color(enum.Enum):
    RED = 1
@dataclasses.dataclass
class Record:
    one: int
    two: int = 2
@dataclasses.dataclass
class Longer(Record):
    three: int = 3
@dataclasses.dataclass(frozen=True)
class Frozen:
    four: int
class Slotted:
    __slots__ = ("a",)
""",
}
EXPECTED = {
    "": "module",
    "core": "module",
    "helper": "def (a, *rest, b=...)",
    "Renamed": "class",
    "Renamed.first": "attribute",
    "Renamed.field": "attribute",
    "Renamed.size": "property",
    "Renamed.cached": "property",
    "Renamed.make": "abstract static def (a)",
    "Renamed.build": "class def (cls, b)",
    "Renamed.gone": "removed def (self, a)",
    "Renamed.must": "abstract def (self)",
    "Renamed.nothing": None,
    "Late": "class",
    "absent": None,
    "tools.same": "def (a, *rest, b=...)",
    "tools.shaped": "def (a, b=..., /, c=..., *, d, **more)",
    "tools.here": "variable",
    "tools.absent": "variable",
    "tools.functools": "variable",
    "tools.Late": None,  # which only type checkers import
    "core.Left.must": "def (self)",
    "core.Both.build": "def (self, other)",
    "core.Both.must": "def (self)",
    "core.Both.__init__": "def (self, right, *, first, second=...)",
    "core.Color.RED": "attribute",
    "core.Record.__init__": "def (self, one, two=...)",
    "core.Frozen": "frozen class",
    "core.Longer.__init__": "def (self, one, two=..., three=...)",
    "core.Slotted": "frozen class",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "sample_library"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    sys.path.insert(0, str(folder.parent))
    yield folder
    sys.path.remove(str(folder.parent))


@pytest.mark.parametrize("path", EXPECTED)
def test_source_is_read_as_python_reads_it(package, path):
    full = f"sample_library.{path}".rstrip(".")
    text = Source.from_directory("sample_library", package).describe(full)
    assert text == EXPECTED[path]
    found = importlib.import_module("sample_library")
    for part in filter(None, path.split(".")):
        found = getattr(found, part, None)
    if text is None:
        assert found is None
    elif "def" in text and path != "core.Both.__init__":  # of which Python shows **kwargs
        stated = parse(text)
        if "class def" in text:  # bound to the class already
            stated = without_first(stated)
        assert parameters(inspect.signature(found)) == parameters(stated)


def test_wheel_and_directory_are_read_alike(package, tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "sample_library-1.whl", "w") as wheel:
        for file in package.iterdir():
            if file.suffix == ".py":
                wheel.write(file, f"sample_library/{file.name}")
        wheel.writestr("other/__init__.py", "x = 1")
    source = Source.from_wheel("sample_library", tmp_path / "sample_library-1.whl")
    for path, text in EXPECTED.items():
        assert source.describe(f"sample_library.{path}".rstrip(".")) == text
    assert source.describe("other.x") is None


def test_members_are_inherited_too(package):
    source = Source.from_directory("sample_library", package)
    members = source.members("sample_library.core.Both")
    assert {"__init__", "must", "build", "make", "size", "first", "field"} <= set(members)
    with pytest.raises(LookupError, match="not a class"):
        source.members("sample_library.helper")
