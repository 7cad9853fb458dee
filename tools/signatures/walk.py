"""What our source takes from a library: names it imports, calls, reads, and classes it extends.

Found by walking the source, so that the list cannot fall behind it. Followed are imports at any
depth, `from .ours import name` of what another of our files has from the library, the table `_LAZY`
of names by module, our own classes that extend the library's or such a one of ours, with `self` and
`super()`, and alternatives, of which any will do: `getattr(m, "new", None) or m.old`, and
`try: from a import x` with another `x` in its `except ImportError`.

What type an object has that the library hands us, syntax does not say: `objects` of `walk` does,
{file: {expression: Object}}.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .syntax import FUNCTION, absolute, assigned_to_self, bindings, describe_function
from .uses import Call, Found, Object, OwnClass, Use


@dataclass(frozen=True)
class Ref:
    """What an expression is: a name of the library, or one of several alternatives."""

    paths: tuple[str, ...]
    instance: bool = False
    object: Object | None = None

    def member(self, name: str) -> Ref | None:
        if self.object is not None and self.object.is_ours(name):
            return None
        return Ref(tuple(f"{path}.{name}" for path in self.paths), self.instance)


@dataclass(frozen=True)
class _Self:
    own: OwnClass


@dataclass(frozen=True)
class _Module:
    """A module of ours."""

    name: str


_Entity = Ref | OwnClass | _Self | _Module
_Objects = Mapping[str, Mapping[str, Object]]


def walk(library: str, root: Path, folders: Iterable[str], objects: _Objects) -> Found:
    """Everything that the Python files of `folders` (relative to root) take from `library`."""
    files = sorted(file for folder in folders for file in (root / folder).rglob("*.py"))
    texts = {file.relative_to(root).as_posix(): file.read_text("utf-8") for file in files}
    return walk_texts(library, texts, objects)


def walk_texts(library: str, texts: Mapping[str, str], objects: _Objects) -> Found:
    """`walk` of file contents by path."""
    trees = {file: ast.parse(text) for file, text in texts.items()}
    found = Found()
    found.unused_objects = {(file, text) for file, entry in objects.items() for text in entry}
    modules: dict[str, _File] = {}
    for file, tree in trees.items():
        one = _File(library, file, tree, objects.get(file, {}), found, modules)
        modules[one.name] = one
    for one in modules.values():
        one.visit(one.tree)
    found.uses = list(dict.fromkeys(found.uses))
    return found


class _File(ast.NodeVisitor):
    def __init__(
        self,
        library: str,
        file: str,
        tree: ast.Module,
        objects: Mapping[str, Object],
        found: Found,
        modules: Mapping[str, _File],
    ) -> None:
        self.library, self.file, self.tree, self.objects = library, file, tree, objects
        self.name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.found, self.modules = found, modules
        self.own: list[_Self] = []
        self.imported = self._imports()

    def _imports(self) -> dict[str, ast.AST]:
        """Imports of every depth by the name that they bind."""
        found: dict[str, ast.AST] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name in bindings([node]):
                    found.setdefault(name, node)
        return found

    def exported(self, name: str) -> _Entity | None:
        """What `name` is in this file."""
        node = self.imported.get(name)
        if isinstance(node, ast.Import):
            full = next(a.name for a in node.names if (a.asname or a.name.split(".")[0]) == name)
            if full.split(".")[0] != self.library:
                return None
            aliased = any(a.asname == name for a in node.names)
            return self._with_alternatives(name, Ref((full if aliased else name,)))
        if isinstance(node, ast.ImportFrom):
            source = next(a.name for a in node.names if (a.asname or a.name) == name)
            base = absolute(self.name, self.file.endswith("/__init__.py"), node)
            if base.split(".")[0] == self.library:
                return self._with_alternatives(name, Ref((f"{base}.{source}",)))
            if base in self.modules and (entity := self.modules[base].exported(source)):
                return entity
            full = f"{base}.{source}"
            return _Module(full) if full in self.modules else None
        for module, names in self._lazy().items():
            if name in names:
                return Ref((f"{module}.{name}",))
        for statement in self.tree.body:
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return self._own_class(statement)
            if isinstance(statement, ast.Assign) and name in bindings([statement]):
                value = statement.value
                return self._value(value) if isinstance(value, ast.BoolOp) else None
        return None

    def _with_alternatives(self, name: str, first: Ref) -> Ref:
        paths = [*first.paths]
        for node in ast.walk(self.tree):
            if not isinstance(node, ast.Try):
                continue
            handlers = [statement for handler in node.handlers for statement in handler.body]
            other = bindings(handlers).get(name)
            if isinstance(other, ast.ImportFrom) and name in bindings(node.body):
                source = next(a.name for a in other.names if (a.asname or a.name) == name)
                paths.append(f"{other.module}.{source}")
        return replace(first, paths=tuple(paths))

    def _lazy(self) -> dict[str, tuple[str, ...]]:
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and "_LAZY" in bindings([node]):
                table: dict[str, tuple[str, ...]] = ast.literal_eval(node.value)
                return {m: n for m, n in table.items() if m.split(".")[0] == self.library}
        return {}

    def _own_class(self, node: ast.ClassDef) -> OwnClass | None:
        for base in node.bases:
            ref = self._value(base)
            members: dict[str, str] = {}
            if isinstance(ref, OwnClass):
                members |= ref.members
                ref = Ref(ref.base)
            if not isinstance(ref, Ref):
                continue
            for name, member in bindings(node.body).items():
                members[name] = "attribute"
                if isinstance(member, FUNCTION):
                    members[name] = describe_function(member)
            for name, _ in assigned_to_self(node):
                members.setdefault(name, "attribute")
            return OwnClass(self._where(node), node.name, ref.paths, members)
        return None

    def _value(self, node: ast.AST) -> _Entity | None:
        known = self._object(node)
        return known if known is not None else self._plain_value(node)

    def _object(self, node: ast.AST) -> Ref | None:
        if not self.objects or not isinstance(node, ast.expr):
            return None
        text = ast.unparse(node)
        if text not in self.objects:
            return None
        self.found.unused_objects.discard((self.file, text))
        entry = self.objects[text]
        return Ref((entry.path,), instance=True, object=entry)

    def _plain_value(self, node: ast.AST) -> _Entity | None:
        """Without looking at `objects`."""
        if isinstance(node, ast.Name):
            return self.own[-1] if node.id == "self" and self.own else self.exported(node.id)
        if isinstance(node, ast.Attribute):
            return self._member(self._value(node.value), node.attr)
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            values = [self._value(value) for value in node.values]
            refs = [value for value in values if isinstance(value, Ref)]
            if len(refs) == len(values):
                paths = tuple(path for ref in refs for path in ref.paths)
                return Ref(paths, refs[0].instance)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "super" and self.own:
                return Ref(self.own[-1].own.base, instance=True)
            if node.func.id == "getattr" and isinstance(node.args[1], ast.Constant):
                return self._member(self._value(node.args[0]), str(node.args[1].value))
        return None

    def _member(self, owner: _Entity | None, name: str) -> _Entity | None:
        if isinstance(owner, Ref):
            return owner.member(name)
        if isinstance(owner, _Module):
            return self.modules[owner.name].exported(name)
        if isinstance(owner, OwnClass | _Self):
            own, instance = (owner.own, True) if isinstance(owner, _Self) else (owner, False)
            return None if name in own.members else Ref(own.base, instance).member(name)
        return None

    def _where(self, node: ast.AST) -> str:
        return f"{self.file}:{getattr(node, 'lineno', 0)}"

    def _use(self, node: ast.AST, entity: _Entity | None, call: Call | None = None) -> None:
        if isinstance(entity, OwnClass) and call is not None and "__init__" not in entity.members:
            entity = Ref(entity.base, instance=True).member("__init__")
        if isinstance(entity, Ref):
            self.found.uses.append(Use(self._where(node), entity.paths, call, entity.instance))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] == self.library:
                self._use(node, Ref((alias.name,)))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for name in bindings([node]):
            entity = self.exported(name)
            source = next(a.name for a in node.names if (a.asname or a.name) == name)
            if isinstance(entity, Ref) and not node.level:
                path = f"{node.module}.{source}"
                if path not in entity.paths:
                    raise ValueError(
                        f"{self._where(node)}: {name} is {path} here and {entity.paths[0]} "
                        "elsewhere in this file; import one of them `as` another name"
                    )
            self._use(node, entity)

    def visit_Assign(self, node: ast.Assign) -> None:
        if "_LAZY" in bindings([node]):
            for module, names in self._lazy().items():
                for name in names:
                    self._use(node, Ref((f"{module}.{name}",)))
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        own = self._own_class(node)
        for decorator in node.decorator_list:
            self._use(node, self._value(decorator), Call(1))
        if own is not None:
            self.found.classes.append(own)
            self.own.append(_Self(own))
        self.generic_visit(node)
        if own is not None:
            self.own.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for decorator in node.decorator_list:
            self._use(node, self._value(decorator), Call(1))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self._use(node, self._plain_value(node))  # getattr(m, "name")
        call = Call(
            sum(not isinstance(a, ast.Starred) for a in node.args),
            tuple(k.arg for k in node.keywords if k.arg is not None),
            any(isinstance(a, ast.Starred) for a in node.args),
            any(k.arg is None for k in node.keywords),
        )
        self._use(node, self._value(node.func), call)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self._object(node.value)
        if isinstance(node.ctx, ast.Load):
            self._use(node, self._plain_value(node))
        elif owner is not None and owner.object is not None and owner.object.ours:
            self.found.uses.append(Use(self._where(node), owner.paths, attaches=True))
        elif owner is not None:
            self._use(node, self._plain_value(node))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        alternatives = self._plain_value(node)
        if isinstance(alternatives, Ref):
            self._use(node, alternatives)
        else:
            self.generic_visit(node)
