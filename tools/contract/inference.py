"""What kind of object an expression gives, as far as annotations say."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from contract.source import FUNCTIONS, Definition, Member, Tree, decorators

SEQUENCES = {"list", "Sequence", "tuple", "set", "Iterable", "Iterator", "deque", "Collection"}
MAPPINGS = {"dict", "Mapping", "defaultdict", "OrderedDict"}
KEY_VALUE = {"items", "values", "get", "pop", "setdefault"}


@dataclass(frozen=True)
class Instance:
    """An object of a class."""

    cls: Definition


@dataclass(frozen=True)
class Many:
    """A sequence of objects, or a mapping to them."""

    element: Any
    is_mapping: bool = False


@dataclass(frozen=True)
class Bound:
    """A method taken from an object or a class."""

    cls: Definition
    member: Member
    needs_self: bool = False  # taken from a class, where it is not one of the class itself


Found = Callable[[Definition, str], None]  # a class and the member looked up in it


class Typer:
    """Types of expressions in the code of one module.

    Args:
        tree: where definitions are looked up.
        module: whose code it is.
        variables: possible types of each local variable.
        owner: the class whose methods these are.
        found: told of every member that is looked up.
    """

    def __init__(
        self,
        tree: Tree,
        module: str,
        variables: dict[str, list[Any]] | None = None,
        owner: Definition | None = None,
        found: Found | None = None,
        depth: int = 0,
    ) -> None:
        self.tree = tree
        self.module = module
        self.variables = variables if variables is not None else {}
        self.owner = owner
        self.found = found
        self._depth = depth

    def annotation(self, node: Any) -> Any:
        """Type that an annotation names, or ``None``."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.annotation(ast.parse(node.value, mode="eval").body)
        if isinstance(node, ast.Name | ast.Attribute):
            found = self.tree.dotted(self.module, node)
            return Instance(found) if found is not None and found.is_class else None
        if isinstance(node, ast.BinOp):
            return self.annotation(node.left) or self.annotation(node.right)
        if isinstance(node, ast.Subscript):
            return self._generic(ast.unparse(node.value).split(".")[-1], node.slice)
        return None

    def _generic(self, name: str, argument: Any) -> Any:
        arguments = argument.elts if isinstance(argument, ast.Tuple) else [argument]
        if name in SEQUENCES:
            return Many(self.annotation(arguments[0]))
        if name in MAPPINGS:
            return Many(self.annotation(arguments[-1]), is_mapping=True)
        if name in ("Optional", "Annotated", "Final", "ClassVar"):
            return self.annotation(arguments[0])
        if name == "type":
            found = self.annotation(arguments[0])
            return found.cls if isinstance(found, Instance) else None
        return None

    def expression(self, node: Any) -> Any:
        """Type of an expression: a class or function is its definition; ``None``: not known."""
        method = getattr(self, f"_{type(node).__name__.lower()}", None)
        return method(node) if method is not None else None

    def _name(self, node: ast.Name) -> Any:
        if node.id in self.variables:
            return next(iter(self.variables[node.id]), None)
        return self.of(self.tree.find(self.module, node.id))

    def of(self, found: Definition | None) -> Any:
        """Type of a name that a module defines."""
        plain = (*FUNCTIONS, ast.ClassDef)
        if found is None or found.node is None or isinstance(found.node, plain):
            return found
        return Typer(self.tree, found.module, depth=self._depth + 1).assigned(found.node)

    def assigned(self, node: Any) -> Any:
        """Type that an assignment gives its target."""
        if self._depth > 6 or node is None:
            return None
        if isinstance(node, ast.AnnAssign):
            return self.annotation(node.annotation) or self.expression(node.value)
        return self.expression(getattr(node, "value", None))

    def _attribute(self, node: ast.Attribute) -> Any:
        candidates = [self.expression(node.value)]
        if isinstance(node.value, ast.Name):
            candidates = self.variables.get(node.value.id) or candidates
        found = candidates[0]
        if isinstance(found, Definition) and found.node is None:
            return self.of(self.tree.find(found.module, node.attr))
        if isinstance(found, Many):
            return found if node.attr in KEY_VALUE and found.is_mapping else None
        classes = [c.cls if isinstance(c, Instance) else c for c in candidates]
        classes = [c for c in classes if isinstance(c, Definition) and c.is_class]
        for cls in classes:  # an isinstance() may have told which one it is
            if self.tree.member(cls, node.attr) is not None:
                member = self._member(cls, node.attr)
                if isinstance(member, Bound) and isinstance(found, Definition):
                    kinds = decorators(member.member.node) & {"staticmethod", "classmethod"}
                    return replace(member, needs_self=not kinds)
                return member
        if classes and self.found is not None:
            self.found(classes[0], node.attr)
        return None

    def _member(self, cls: Definition, name: str) -> Any:
        if self.found is not None:
            self.found(cls, name)
        member = self.tree.member(cls, name)
        assert member is not None
        if isinstance(member.node, FUNCTIONS) and member.method is None:
            if decorators(member.node) & {"property", "cached_property"}:
                return self._inside(member).annotation(member.node.returns)
            return Bound(cls, member)
        return self._inside(member).assigned(member.node)

    def _inside(self, member: Member) -> Typer:
        """A typer for the code in which a member is defined."""
        variables: dict[str, list[Any]] = {}
        owner, depth = member.owner, self._depth + 1
        inner = Typer(self.tree, owner.module, variables, owner, depth=depth)
        if member.method is not None:
            variables.update(parameter_types(inner, member.method))
        return inner

    def _call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id == "next" and node.args:
            inner = self.expression(node.args[0])
            return inner.element if isinstance(inner, Many) else None
        called = self.expression(node.func)
        if isinstance(called, Many):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            return called if name in ("items", "values") else called.element
        if isinstance(called, Definition) and called.is_class:
            return Instance(called)
        if isinstance(called, Definition) and isinstance(called.node, FUNCTIONS):
            return Typer(self.tree, called.module).annotation(called.node.returns)
        if isinstance(called, Bound):
            return self._inside(called.member).annotation(called.member.node.returns)
        return None

    def _subscript(self, node: ast.Subscript) -> Any:
        value = self.expression(node.value)
        if isinstance(value, Many):
            is_part = isinstance(node.slice, ast.Slice)
            return value if is_part else value.element
        return None

    def _boolop(self, node: ast.BoolOp) -> Any:
        return next((t for t in map(self.expression, node.values) if t is not None), None)

    def _ifexp(self, node: ast.IfExp) -> Any:
        return self.expression(node.body) or self.expression(node.orelse)

    def _generatorexp(self, node: Any) -> Any:
        return Many(self.expression(node.elt))

    _listcomp = _generatorexp


def parameter_types(typer: Typer, function: Any) -> dict[str, list[Any]]:
    """Types of a function's parameters by name, ``self`` and ``cls`` too."""
    args = function.args
    every = args.posonlyargs + args.args + args.kwonlyargs
    types = {a.arg: [typer.annotation(a.annotation)] for a in every}
    is_static = "staticmethod" in decorators(function)
    if typer.owner is not None and every and not is_static:
        is_cls = "classmethod" in decorators(function)
        types[every[0].arg] = [typer.owner if is_cls else Instance(typer.owner)]
    return {name: [t for t in found if t is not None] for name, found in types.items()}
