"""Whether a release has what our source takes from a library, as its signature file says."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

from .syntax import make_arguments, signature
from .uses import Call, Found, OwnClass, Use

Names = Mapping[str, "str | None"]
LEAVES = ("attribute", "variable", "property", "abstract property")


def problems(found: Found, release: str, names: Names) -> list[str]:
    """One line for each thing that `release` does not have or take as we need it."""
    lines = [f"{use.where}: {text}" for use in found.uses for text in _of_use(use, names)]
    lines += [f"{own.where}: {text}" for own in found.classes for text in _of_class(own, names)]
    return [line.replace("{release}", release) for line in dict.fromkeys(lines)]


def _of_use(use: Use, names: Names) -> Iterator[str]:
    unknown = [path for path in use.paths if path not in names and not _inside(path, names)]
    if unknown:
        yield _make_anew(f"whether there is {unknown[0]}")
        return
    path = next((p for p in use.paths if _inside(p, names) or _exists(p, names)), None)
    if path is None:
        yield f"{{release}} has no {' and no '.join(use.paths)}"
    elif use.attaches and "frozen" in (names[path] or ""):
        yield f"attaches an attribute to {path}, which is frozen in {{release}}"
    elif use.call is not None and not _inside(path, names):
        yield from _of_call(use.call, path, use.instance, names)


def _make_anew(what: str) -> str:
    return f"the file of {{release}} does not say {what}: python -m tools.signatures"


def _exists(path: str, names: Names) -> bool:
    owner, _, name = path.rpartition(".")
    text = names.get(owner if name == "__init__" else path)
    return text is not None and not text.startswith("removed")


def _inside(path: str, names: Names) -> bool:
    """Whether path goes on behind a value, of which a signature file says no more."""
    owner = path.rpartition(".")[0]
    return path not in names and bool(owner) and (
        names.get(owner) in LEAVES or _inside(owner, names)
    )  # fmt: skip


def _of_call(call: Call, path: str, instance: bool, names: Names) -> Iterator[str]:
    if (names[path] or "").endswith("class"):
        path, instance = f"{path}.__init__", True
    text = names.get(path)
    if text is None or not text.partition("(")[0].endswith("def "):
        return  # a constructor of Python's or another library's, or a value
    expected = parse(text)
    is_method = path.rpartition(".")[0] in names and (
        names[path.rpartition(".")[0]] or ""
    ).endswith("class")
    if is_method and ("class def" in text or (instance and "static def" not in text)):
        expected = without_first(expected)
    wrong = mismatch(call, expected)
    if wrong:
        yield f"calls {path}{call}; {{release}} has {text}: {wrong}"


def mismatch(call: Call, expected: inspect.Signature) -> str | None:
    """Why a call does not fit a signature."""
    given = [None] * call.positional
    keywords = dict.fromkeys(call.keywords)
    bind = expected.bind_partial if call.star or call.star_star else expected.bind
    try:
        bind(*given, **keywords)
    except TypeError as error:
        return str(error)
    return None


def _of_class(own: OwnClass, names: Names) -> Iterator[str]:
    base = next((path for path in own.base if names.get(path)), None)
    if base is None:
        return  # its import is a use
    if not (names[base] or "").startswith("whole "):
        yield _make_anew(f"which members {base} has")
    members = {
        path.removeprefix(f"{base}."): text
        for path, text in names.items()
        if path.startswith(f"{base}.") and text is not None
    }
    for name, text in members.items():
        ours = own.members.get(name)
        if ours is None:
            if text.startswith("abstract"):
                yield f"{own.name} lacks {name}, which is abstract in {{release}}: {text}"
        elif name != "__init__":  # constructors are called by us alone
            wrong = override_mismatch(ours, text)
            if wrong:
                yield f"{own.name}.{name} is {ours}; {{release}} has {text}: {wrong}"


def override_mismatch(ours: str, theirs: str) -> str | None:
    """Why our member cannot stand in for theirs."""
    theirs = theirs.removeprefix("abstract ")
    if "def (" not in theirs or "def (" not in ours:
        if ("def (" in theirs) != ("def (" in ours):
            return "one is called, the other is not"
        return None
    mine, base = (_bound(text) for text in (ours, theirs))
    P = inspect.Parameter
    kinds = {p.kind for p in base.parameters.values()}
    for kind, star in ((P.VAR_POSITIONAL, "*"), (P.VAR_KEYWORD, "**")):
        if kind in kinds and kind not in {p.kind for p in mine.parameters.values()}:
            return f"takes no {star}"
    named = [p for p in base.parameters.values() if p.kind not in (P.VAR_POSITIONAL, P.VAR_KEYWORD)]
    required = [p for p in named if p.default is P.empty]
    for parameters in (named, required):
        for by_keyword in (False, True):
            if wrong := _accepts(mine, parameters, by_keyword):
                return wrong
    return None


def _accepts(
    mine: inspect.Signature, parameters: list[inspect.Parameter], by_keyword: bool
) -> str | None:
    """Why `mine` does not take these arguments, or takes one under another name."""
    P = inspect.Parameter
    kinds = [P.POSITIONAL_ONLY] if by_keyword else [P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD]
    args = [p.name for p in parameters if p.kind in kinds]
    kwargs = {p.name: p.name for p in parameters if p.kind not in kinds}
    try:
        bound = mine.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    for name, value in bound.arguments.items():
        if mine.parameters[name].kind not in (P.VAR_POSITIONAL, P.VAR_KEYWORD) and name != value:
            return f"takes {value!r} as {name!r}"
    return None


def parse(text: str) -> inspect.Signature:
    """The signature in "static def (a, b=...)"."""
    return signature(make_arguments(text.partition("(")[2].removesuffix(")")))


def without_first(full: inspect.Signature) -> inspect.Signature:
    parameters = list(full.parameters.values())
    if parameters and parameters[0].kind != inspect.Parameter.VAR_POSITIONAL:
        parameters = parameters[1:]
    return full.replace(parameters=parameters)


def _bound(text: str) -> inspect.Signature:
    return parse(text) if "static def" in text else without_first(parse(text))
