"""What Python says of the names in a release's file; the reader of sources could be wrong.

Run as a program, `python installed.py LIBRARY RELEASE`, because triton's interpreter leaves the
language replaced once kernels have run. Prints how many signatures were compared.
"""

import importlib
import inspect
import sys

from checks import parameters

from tools.signatures.check import parse, without_first
from tools.signatures.libraries import LIBRARIES


def compare(names):
    """Assert that what is installed has `names`; the number of signatures."""
    compared = 0
    for path, text in names.items():
        if path.endswith(".__init__"):
            compared += text is not None and same_constructor(path, parse(text))
            continue
        found = resolve(path)
        if text is None:
            assert found is None, f"{path} is {found}"
        elif text != "attribute":  # which may be an instance's
            assert found is not None, f"{path} is not there"
        kind = text.partition("(")[0] if text else ""
        if kind.endswith("class"):
            assert inspect.isclass(found), path
        elif kind.endswith("property"):
            assert hasattr(found, "__get__") and not inspect.isroutine(found), path
        elif kind.endswith("def "):
            assert ("static" in kind) == isinstance(found, staticmethod), path
            assert ("class " in kind) == isinstance(found, classmethod), path
            compared += same_arguments(path, found, parse(text))
    return compared


def resolve(path):
    """What Python has under a dotted path, as stored in its owner; None if there is nothing."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            if inspect.ismodule(found):
                found = getattr(found, part, None)
            else:
                found = inspect.getattr_static(found, part, None)
        return None if found is object.__repr__ else found
    return None


def same_arguments(path, found, expected):
    """Whether Python says what a function takes; asserts that it is what is expected."""
    function = getattr(found, "__func__", getattr(found, "fn", found))
    try:
        actual = inspect.signature(function)
    except ValueError:
        return False
    assert parameters(actual) == parameters(expected), path
    return True


def same_constructor(path, expected):
    """The same of a class."""
    try:
        actual = inspect.signature(resolve(path.removesuffix(".__init__")))
    except ValueError:
        return False
    if any(p.kind == p.VAR_KEYWORD for p in actual.parameters.values()):
        return False  # the file says what the next class takes
    assert parameters(actual) == parameters(without_first(expected)), path
    return True


if __name__ == "__main__":
    print(compare(LIBRARIES[sys.argv[1]].load(sys.argv[2])))
