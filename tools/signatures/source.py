"""A release's Python source, and what it says a dotted name is, without importing it.

`Source.describe("vllm.model_executor.utils.replace_parameter")` is text, as the signature files
hold it; None if there is nothing of that name:

  module | variable | attribute | property | class | frozen class
  def (layer, param_name, new_data, prefer_copy=...)    before `def`: abstract, static, class, or
                                                        removed (it only raises, saying so)

A signature file puts `whole` before a class of which it has all members.
`variable` is a module's, `attribute` a class's: a field, an enum's member, or assigned to `self`.
What a name was imported from is followed through the package; a name from outside it is a
`variable`. Annotations and the values of defaults are left out: they change in every release.
"""

from __future__ import annotations

import ast
import copy
import zipfile
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from .syntax import (
    FUNCTION,
    Function,
    absolute,
    assigned_to_self,
    bindings,
    calls_super,
    describe_function,
    is_dataclass,
    is_frozen,
    is_type_checking,
    make_arguments,
    module_name,
    plain_arguments,
)


class Definition(NamedTuple):
    """A definition: the module (or None if it is outside the package), and the statement there."""

    module: str | None
    node: ast.AST


class Source:
    """The Python files of one package, by the name of their module."""

    def __init__(self, package: str, files: Mapping[str, str]) -> None:
        self.package = package
        self._files = files
        self._scopes: dict[str, dict[str, ast.AST]] = {}
        self._classes: dict[int, Class] = {}

    @classmethod
    def from_wheel(cls, package: str, path: Path) -> Source:
        with zipfile.ZipFile(path) as wheel:
            names = [n for n in wheel.namelist() if n.startswith(f"{package}/")]
            names = [n for n in names if n.endswith(".py")]
            return cls(package, {module_name(n): wheel.read(n).decode() for n in names})

    @classmethod
    def from_directory(cls, package: str, path: Path) -> Source:
        files = {p.relative_to(path.parent).as_posix(): p for p in path.rglob("*.py")}
        return cls(package, {module_name(n): p.read_text("utf-8") for n, p in files.items()})

    def describe(self, path: str) -> str | None:
        """What `path` is, as the module's docstring says."""
        found = self.find(path)
        if found is None:
            return None
        node, parents = found.node, path.rpartition(".")[0]
        if isinstance(node, ast.Module):
            return "module"
        if isinstance(node, ast.ClassDef):
            return f"{'frozen ' * is_frozen(node)}class"
        owner = self.find(parents)
        in_class = owner is not None and isinstance(owner.node, ast.ClassDef)
        if isinstance(node, FUNCTION):
            return describe_function(node)
        if isinstance(node, ast.arguments):  # a constructor that a decorator or base writes
            return f"def ({ast.unparse(plain_arguments(node))})"
        return "attribute" if in_class else "variable"

    def is_inside_value(self, path: str) -> bool:
        """Whether path goes on behind something that is neither a module nor a class."""
        owner = self.find(path.rpartition(".")[0]) if "." in path else None
        return owner is not None and not isinstance(owner.node, ast.Module | ast.ClassDef)

    def members(self, path: str) -> list[str]:
        """Names of all members of a class that the package defines, with its bases'."""
        found = self.find(path)
        if found is None or found.module is None or not isinstance(found.node, ast.ClassDef):
            raise LookupError(f"{path} is not a class of {self.package}")
        names = {name for c in self.class_of(found).mro for name in c.members}
        return sorted(n for n in names if n == "__init__" or not n.startswith("__"))

    def find(self, path: str) -> Definition | None:
        """Follow a dotted path from the package down; None where it ends."""
        package, *rest = path.split(".")
        found: Definition | None = self._module(package)
        for name in rest:
            if found is None:
                return None
            if isinstance(found.node, ast.Module):
                assert found.module is not None
                found = self._in_module(found.module, name)
            elif isinstance(found.node, ast.ClassDef) and found.module is not None:
                found = self.class_of(found).find(name)
            else:
                return None
        return found

    def class_of(self, found: Definition) -> Class:
        assert found.module is not None and isinstance(found.node, ast.ClassDef)
        key = id(found.node)
        if key not in self._classes:
            self._classes[key] = Class(self, found.module, found.node)
        return self._classes[key]

    def resolve(self, module: str, node: ast.AST) -> Definition | None:
        """What an expression of names and dots means in a module."""
        if isinstance(node, ast.Subscript):  # Base[T]
            return self.resolve(module, node.value)
        if isinstance(node, ast.Name):
            return self._in_module(module, node.id)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(module, node.value)
            if owner is not None and owner.module and isinstance(owner.node, ast.Module):
                return self._in_module(owner.module, node.attr)
        return None

    def _module(self, name: str) -> Definition | None:
        if name not in self._files:
            return None
        if name not in self._scopes:
            tree = ast.parse(self._files[name])
            self._scopes[name] = {"": tree, **bindings(tree.body)}
            if "__getattr__" in self._scopes[name]:  # which gives what only type checkers import
                for node in filter(is_type_checking, tree.body):
                    assert isinstance(node, ast.If)
                    for key, value in bindings(node.body).items():
                        self._scopes[name].setdefault(key, value)
        return Definition(name, self._scopes[name][""])

    def _in_module(self, module: str, name: str) -> Definition | None:
        here = self._module(module)
        if here is None:
            return None
        node = self._scopes[module].get(name)
        if node is None:
            return self._module(f"{module}.{name}")
        if isinstance(node, ast.ImportFrom):
            return self._import_from(module, node, name)
        if isinstance(node, ast.Import):
            alias = next(a for a in node.names if (a.asname or a.name.split(".")[0]) == name)
            target = alias.name if alias.asname else name
            return self._module(target) or Definition(None, node)
        if isinstance(node, ast.Assign):  # another name of the same thing, or a wrapper of it
            value = node.value
            if isinstance(value, ast.Call) and len(value.args) == 1 and not value.keywords:
                value = value.args[0]
            same = None if isinstance(value, ast.Name) and value.id == name else value
            followed = self.resolve(module, same) if same is not None else None
            if followed is not None and isinstance(followed.node, (*FUNCTION, ast.ClassDef)):
                return followed
        return Definition(module, node)

    def _import_from(self, module: str, node: ast.ImportFrom, name: str) -> Definition | None:
        alias = next(a for a in node.names if (a.asname or a.name) == name)
        base = absolute(module, self.is_package(module), node)
        if base.split(".")[0] != self.package:
            return Definition(None, node)
        if base == module:  # `from . import submodule` in a package's own __init__
            return self._module(f"{base}.{alias.name}")
        return self._in_module(base, alias.name)

    def is_package(self, module: str) -> bool:
        return any(name.startswith(f"{module}.") for name in self._files)


class Class:
    """A class of the package with what it defines itself and what it inherits there."""

    def __init__(self, source: Source, module: str, node: ast.ClassDef) -> None:
        self.source, self.module, self.node = source, module, node

    @cached_property
    def members(self) -> dict[str, ast.AST]:
        own = bindings(self.node.body)
        for name, node in assigned_to_self(self.node):
            own.setdefault(name, node)
        if "__init__" not in own and (fields := self._constructor()) is not None:
            own["__init__"] = fields
        return own

    @cached_property
    def bases(self) -> list[Class]:
        found = (self.source.resolve(self.module, base) for base in self.node.bases)
        return [
            self.source.class_of(f)
            for f in found
            if f is not None and f.module is not None and isinstance(f.node, ast.ClassDef)
        ]

    @cached_property
    def mro(self) -> list[Class]:
        """Python's own order, of empty classes with these bases."""
        stand_ins: dict[int, type] = {}
        classes: dict[type, Class] = {}

        def build(c: Class) -> type:
            if id(c.node) not in stand_ins:
                made = type(c.node.name, tuple(build(base) for base in c.bases), {})
                stand_ins[id(c.node)], classes[made] = made, c
            return stand_ins[id(c.node)]

        return [classes[c] for c in build(self).__mro__[:-1]]

    def find(self, name: str) -> Definition | None:
        for c in self.mro:
            if name in c.members:
                node = c.members[name]
                if name == "__init__" and isinstance(node, FUNCTION):
                    node = self._forwarded(node, self.mro[self.mro.index(c) + 1 :])
                return Definition(c.module, node)
        return None

    def _forwarded(self, init: Function, rest: list[Class]) -> Function:
        """A constructor that hands **kwargs to super().__init__ takes the next one's arguments."""
        following = next((c for c in rest if isinstance(c.members.get("__init__"), FUNCTION)), None)
        if following is None or init.args.kwarg is None or not calls_super(init):
            return init
        node = following.members["__init__"]
        assert isinstance(node, FUNCTION)
        inner = self._forwarded(node, rest[rest.index(following) + 1 :]).args
        merged = copy.deepcopy(init)
        own = {a.arg for a in (*init.args.args, *init.args.kwonlyargs)}
        required = len(inner.args) - len(inner.defaults)
        pairs = [
            (a, None if i < required else inner.defaults[i - required])
            for i, a in enumerate(inner.args)
        ] + list(zip(inner.kwonlyargs, inner.kw_defaults, strict=True))
        for argument, default in pairs:
            if argument.arg not in own:
                merged.args.kwonlyargs.append(argument)
                merged.args.kw_defaults.append(default)
        merged.args.kwarg = inner.kwarg
        return merged

    def _constructor(self) -> ast.arguments | None:
        """Of a dataclass or msgspec.Struct: its fields, bases' first."""
        if not is_dataclass(self.node) and not any(
            ast.unparse(base) == "msgspec.Struct" for base in self.node.bases
        ):
            return None
        fields: dict[str, bool] = {}
        for c in reversed(self.mro_of_fields()):
            for node in c.node.body:
                if (
                    isinstance(node, ast.AnnAssign)
                    and isinstance(node.target, ast.Name)
                    and "ClassVar" not in ast.unparse(node.annotation)
                    and "init=False" not in (ast.unparse(node.value) if node.value else "")
                ):
                    fields[node.target.id] = node.value is not None
        text = ", ".join(f"{name}=..." if default else name for name, default in fields.items())
        return make_arguments(f"self, {text}")

    def mro_of_fields(self) -> list[Class]:
        return [c for c in self.mro if is_dataclass(c.node) or c is self]
