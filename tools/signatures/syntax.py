"""What statements bind and declare: syntax alone, whosever source it is."""

from __future__ import annotations

import ast
import copy
import inspect
import re
from collections.abc import Iterator, Sequence

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
REGISTER = ("self.register_buffer", "self.register_parameter")


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    """The module that `from ... import` names."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *filter(None, [node.module])])


def bindings(body: Sequence[ast.stmt]) -> dict[str, ast.AST]:
    """Names that statements bind; of `if`, `try` and their kin, the first branch goes first."""
    found: dict[str, ast.AST] = {}
    for node in body:
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            if not any(
                ast.unparse(d).endswith(("overload", ".setter")) for d in node.decorator_list
            ):
                found[node.name] = node
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name
                found[name if isinstance(node, ast.ImportFrom) else name.split(".")[0]] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for inner in ast.walk(target):
                    if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                        found[inner.id] = node
        elif is_type_checking(node):
            assert isinstance(node, ast.If)
            found.update(bindings(node.orelse))
        elif isinstance(node, ast.If | ast.Try | ast.With):
            branches = [node.body, *(h.body for h in getattr(node, "handlers", []))]
            branches += [getattr(node, "orelse", []), getattr(node, "finalbody", [])]
            for branch in reversed(branches):
                found.update(bindings(branch))
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def assigned_to_self(node: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """Attributes that the methods of a class assign, or register as torch modules do."""
    for method in bindings(node.body).values():
        if not isinstance(method, FUNCTION):
            continue
        for inner in ast.walk(method):
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                if ast.unparse(inner.value) == "self":
                    yield inner.attr, inner
            elif isinstance(inner, ast.Call) and ast.unparse(inner.func) in REGISTER:
                name = inner.args[0] if inner.args else None
                if isinstance(name, ast.Constant):
                    yield str(name.value), inner


def calls_super(init: Function) -> bool:
    """Whether a constructor calls super().__init__(..., **kwargs)."""
    return any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "super().__init__"
        and any(keyword.arg is None for keyword in node.keywords)
        for node in ast.walk(init)
    )


def decorators(node: ast.ClassDef | Function) -> list[str]:
    """The last part of each decorator's name: `abc.abstractmethod` -> "abstractmethod"."""
    calls = (d.func if isinstance(d, ast.Call) else d for d in node.decorator_list)
    return [ast.unparse(d).rsplit(".", 1)[-1] for d in calls]


def is_dataclass(node: ast.ClassDef) -> bool:
    return "dataclass" in decorators(node)


def is_frozen(node: ast.ClassDef) -> bool:
    """Whether instances refuse attributes that the class does not declare."""
    options = " ".join(ast.unparse(d) for d in node.decorator_list)
    return "frozen=True" in options or "slots=True" in options or "__slots__" in bindings(node.body)


def describe_function(node: Function) -> str:
    names = decorators(node)
    words = ["abstract"] if "abstractmethod" in names else []
    if any(name in ("property", "cached_property") for name in names):
        return " ".join([*words, "property"])
    words += [w for w in ("static", "class") if f"{w}method" in names]
    if is_stub(node):
        words = ["removed"]
    return " ".join([*words, f"def ({ast.unparse(plain_arguments(node.args))})"])


def is_stub(node: Function) -> bool:
    """Whether all that a function does is to say that it is no more."""
    body = [s for s in node.body if not isinstance(s, ast.Expr)]  # docstrings
    return (
        len(body) == 1
        and isinstance(body[0], ast.Raise)
        and re.search(r"\bremoved\b", ast.unparse(body[0])) is not None
    )


def plain_arguments(arguments: ast.arguments) -> ast.arguments:
    """Without annotations, and `...` for every default."""
    plain = copy.deepcopy(arguments)
    for node in ast.walk(plain):
        if isinstance(node, ast.arg):
            node.annotation = None
    plain.defaults = [ast.Constant(...) for _ in plain.defaults]
    plain.kw_defaults = [None if d is None else ast.Constant(...) for d in plain.kw_defaults]
    return plain


def make_arguments(text: str) -> ast.arguments:
    """The arguments of `def f(text)`."""
    function = ast.parse(f"def f({text}): pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def signature(arguments: ast.arguments) -> inspect.Signature:
    """As inspect gives it of the function; `...` for every default."""
    P = inspect.Parameter
    only = len(arguments.posonlyargs)
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    found = [
        P(
            a.arg,
            P.POSITIONAL_ONLY if i < only else P.POSITIONAL_OR_KEYWORD,
            default=P.empty if default is None else ...,
        )
        for i, (a, default) in enumerate(zip(positional, defaults, strict=True))
    ]
    if arguments.vararg:
        found.append(P(arguments.vararg.arg, P.VAR_POSITIONAL))
    for a, keyword_default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        empty = P.empty if keyword_default is None else ...
        found.append(P(a.arg, P.KEYWORD_ONLY, default=empty))
    if arguments.kwarg:
        found.append(P(arguments.kwarg.arg, P.VAR_KEYWORD))
    return inspect.Signature(found)
