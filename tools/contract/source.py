"""Definitions in a tree of Python source: names, base classes, members."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

EMPTY_BASES = {"ABC", "Protocol", "Generic", "object"}  # they have no members of interest
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, eq=False)
class Definition:
    """A name and where it is defined; ``node`` is ``None`` for a module."""

    module: str
    name: str
    node: Any

    @property
    def key(self) -> str:
        return f"{self.module}:{self.name}"

    @property
    def is_class(self) -> bool:
        return isinstance(self.node, ast.ClassDef)


@dataclass(frozen=True, eq=False)
class Member:
    """A method, field or attribute of a class; ``method`` is where ``self.name`` is assigned."""

    owner: Definition
    name: str
    node: Any
    method: Any = None


class Tree:
    """Packages by name, each in the folder given for it."""

    def __init__(self, packages: dict[str, Path]) -> None:
        self._packages = packages
        self._modules: dict[str, ast.Module | None] = {}
        self._members: dict[Definition, dict[str, Member]] = {}
        self._found: dict[tuple[str, str], Definition | None] = {}

    def has_package(self, module: str) -> bool:
        return module.partition(".")[0] in self._packages

    def path(self, module: str) -> Path | None:
        """File of a module, or ``None``."""
        package, *rest = module.split(".")
        if package not in self._packages:
            return None
        base = self._packages[package].joinpath(*rest)
        for path in (base / "__init__.py", base.with_name(base.name + ".py")):
            if path.is_file():
                return path
        return None

    def parse(self, module: str) -> ast.Module | None:
        if module not in self._modules:
            text = self.text(module)
            self._modules[module] = None if text is None else ast.parse(text)
        return self._modules[module]

    def text(self, module: str) -> str | None:
        """Source of a module, or ``None`` if there is none."""
        path = self.path(module)
        return path.read_text(encoding="utf8") if path else None

    def find(self, module: str, name: str) -> Definition | None:
        """What a module's attribute is, through any number of imports."""
        key = (module, name)
        if key not in self._found:
            self._found[key] = None  # a circle of imports finds nothing
            self._found[key] = self._find(module, name)
        return self._found[key]

    def _find(self, module: str, name: str) -> Definition | None:
        tree = self.parse(module)
        if tree is None:
            return None
        for node in flat(tree.body):
            if isinstance(node, ast.ImportFrom | ast.Import):
                found = self._imported(module, node, name)
                if found is not None:
                    return found
            elif name in bound_names(node):
                return Definition(module, name, node)
        return self._module(f"{module}.{name}")

    def _imported(self, module: str, node: Any, name: str) -> Definition | None:
        for alias in node.names:
            if (alias.asname or alias.name) != name:
                continue
            if isinstance(node, ast.Import):
                return self._module(alias.name)
            source = self._absolute(module, node)
            return self.find(source, alias.name) or self._module(f"{source}.{alias.name}")
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        path = self.path(module)
        is_package = path is not None and path.name == "__init__.py"
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, node.module] if node.module else base)

    def _module(self, module: str) -> Definition | None:
        return Definition(module, "", None) if self.path(module) else None

    def dotted(self, module: str, node: Any) -> Definition | None:
        """What a name or a dotted name in a module's code is."""
        if isinstance(node, ast.Name):
            return self.find(module, node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(module, node.value)
            if base is not None and base.node is None:
                return self.find(base.module, node.attr)
        return None

    def bases(self, cls: Definition) -> list[Definition]:
        """Base classes that are part of the tree."""
        nodes = [b.value if isinstance(b, ast.Subscript) else b for b in cls.node.bases]
        found = [self.dotted(cls.module, node) for node in nodes]
        return [base for base in found if base is not None and base.is_class]

    def has_foreign_base(self, cls: Definition) -> bool:
        """Whether a base class is not part of the tree, so that any member may be its."""
        for owner in self.mro(cls):
            nodes = [b.value if isinstance(b, ast.Subscript) else b for b in owner.node.bases]
            names = {ast.unparse(n) for n in nodes if self.dotted(owner.module, n) is None}
            if names - EMPTY_BASES:
                return True
        return False

    def mro(self, cls: Definition) -> list[Definition]:
        """A class and its bases in the order in which members are looked up."""
        order = [cls]
        for base in self.bases(cls):
            order += self.mro(base)
        return [c for i, c in enumerate(order) if c not in order[i + 1 :]]

    def members(self, cls: Definition) -> dict[str, Member]:
        """Members that the class itself defines."""
        if cls not in self._members:
            self._members[cls] = dict(_members(cls))
        return self._members[cls]

    def member(self, cls: Definition, name: str) -> Member | None:
        """A member, looked up as Python does."""
        for owner in self.mro(cls):
            if name in self.members(owner):
                return self.members(owner)[name]
        return None

    @cached_property
    def _texts(self) -> dict[str, str]:
        texts = {}
        for package, root in self._packages.items():
            for path in sorted(root.rglob("*.py")):
                parts = [package, *path.relative_to(root).with_suffix("").parts]
                name = ".".join(parts).removesuffix(".__init__")
                texts[name] = path.read_text(encoding="utf8")
        return texts

    def search_class(self, package: str, name: str) -> Definition | None:
        """The one class of this name in a package, wherever it went."""
        line = f"\nclass {name}"
        having = [module for module, text in self._texts.items() if line in "\n" + text]
        modules = [module for module in having if module.startswith(package + ".")]
        found = [self.find(module, name) for module in modules]
        classes = {d.key: d for d in found if d is not None and d.is_class}
        return next(iter(classes.values())) if len(classes) == 1 else None


def flat(body: list[Any]) -> Iterator[Any]:
    """Statements, those inside ``if``, ``try`` and ``with`` too."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from flat(node.body)
            yield from flat(getattr(node, "orelse", []))
            for handler in getattr(node, "handlers", []):
                yield from flat(handler.body)
        else:
            yield node


def bound_names(node: Any) -> set[str]:
    """Names that a statement other than an import binds."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Assign):
        targets = node.targets
    else:
        return set()
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}


def _members(cls: Definition) -> Iterator[tuple[str, Member]]:
    """Members; of two with one name the one that says more comes last."""
    body = list(flat(cls.node.body))
    assigned = [m for node in body if isinstance(node, FUNCTIONS) for m in _assigned(cls, node)]
    assigned.sort(key=lambda m: (isinstance(m.node, ast.AnnAssign), m.method.name == "__init__"))
    for member in assigned:
        yield member.name, member
    for node in body:
        if not decorators(node) & {"setter", "overload"}:
            for name in bound_names(node):
                yield name, Member(cls, name, node)


def _assigned(cls: Definition, method: Any) -> Iterator[Member]:
    """Attributes that a method assigns on its first parameter."""
    for node in ast.walk(method):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if _is_on_self(part, method):
                        yield Member(cls, part.attr, node if part is target else None, method)


def _is_on_self(node: Any, method: Any) -> bool:
    parameters = method.args.posonlyargs + method.args.args
    is_attribute = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return is_attribute and bool(parameters) and node.value.id == parameters[0].arg


def decorators(node: Any) -> set[str]:
    """Last names of a definition's decorators."""
    return {_last_name(d) for d in getattr(node, "decorator_list", ())}


def _last_name(node: Any) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
