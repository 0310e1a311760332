"""What the engine's code relies on in vLLM."""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from contract.inference import Bound, Instance, Many, Typer, parameter_types
from contract.relied import ASSUMED, MEMBERS, NAMES, VALUES
from contract.signatures import Call, Signature, parameters
from contract.source import FUNCTIONS, Definition, Tree, bound_names, decorators, flat

ENGINE = "vllm_sepllm.engine"


def is_theirs(module: str) -> bool:
    """Whether a module is vLLM's."""
    return module.partition(".")[0] == "vllm"


@dataclass
class Need:
    """One name or member of vLLM's that the engine relies on.

    Attributes:
        key: ``module:Name`` or ``module:Class.member``.
        where: a place where it is used.
        calls: shapes of the calls of it, and a place of each.
        overrides: members of ours with this name: signature, kind, place. The member itself may
            well be missing: a method that appears or goes away upstream changes what ours means.
        is_used: whether it must exist.
        implements: for a base class, each class of ours and the names it defines.
    """

    key: str
    where: str
    calls: dict[Call, str] = field(default_factory=dict)
    overrides: list[tuple[Signature | None, str, str]] = field(default_factory=list)
    is_used: bool = False
    implements: list[tuple[str, frozenset[str]]] = field(default_factory=list)


class Usage:
    """Needs of every module of the engine, by key.

    Args:
        tree: vLLM's source under ``vllm``, ours under ``vllm_sepllm``.

    Attributes:
        needs: by key ``module:Name`` or ``module:Class.member``.
        untyped: attributes of objects whose class could not be told, and where.
        own_names: every name that our own code defines.
    """

    def __init__(self, tree: Tree, folder: Path) -> None:
        self.tree = tree
        self.needs: dict[str, Need] = {}
        self.untyped: dict[str, str] = {}
        self.own_names: set[str] = set()
        self._import_keys: dict[str, str] = {}
        self._calls_by_name: dict[str, dict[Call, str]] = defaultdict(dict)
        for path in sorted(folder.parent.rglob("*.py")):
            self._collect_own_names(ast.parse(path.read_text(encoding="utf8")))
        paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
        dotted = [".".join([ENGINE, *path.with_suffix("").parts]) for path in paths]
        modules = [name.removesuffix(".__init__") for name in dotted]
        self._inherited: set[str] = set()
        for module in modules:
            self._imports(module)
        for module in modules:
            self._collect_inherited(module)
        for module in modules:
            self._module(module)
        self._add_listed()

    def need(self, key: str, where: str, used: bool = True) -> Need:
        need = self.needs.setdefault(key, Need(key, where))
        need.is_used |= used
        return need

    def key_of(self, found: Definition) -> str:
        """Key of a name of vLLM's: where the engine imports it from, if it does."""
        return self._import_keys.get(found.key, found.key)

    def _imports(self, module: str) -> None:
        for node in ast.walk(self.tree.parse(module) or ast.Module([], [])):
            if isinstance(node, ast.Import) and any(is_theirs(a.name) for a in node.names):
                raise ValueError(f"{module}:{node.lineno}: only 'from vllm... import' is followed")
            if isinstance(node, ast.ImportFrom) and is_theirs(node.module or ""):
                for alias in node.names:
                    key = f"{node.module}:{alias.name}"
                    self.need(key, f"{module}:{node.lineno}")
                    found = self.tree.find(node.module or "", alias.name)
                    if found is not None and found.node is not None:
                        self._import_keys[found.key] = key

    def _collect_own_names(self, tree: ast.Module) -> None:
        """Functions, classes, fields and attributes; local variables are no attributes."""
        scopes = [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]
        for scope in scopes:
            for node in flat(scope.body):
                self.own_names |= bound_names(node)
        for node in ast.walk(tree):
            is_self = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            if is_self and getattr(node.value, "id", "") in ("self", "cls"):
                self.own_names.add(node.attr)

    def _collect_inherited(self, module: str) -> None:
        """Classes of ours that others of ours complete."""
        for node in ast.walk(self.tree.parse(module) or ast.Module([], [])):
            cls = self.tree.find(module, node.name) if isinstance(node, ast.ClassDef) else None
            if cls is not None:
                self._inherited |= {base.key for base in self.tree.bases(cls)}

    def _module(self, module: str) -> None:
        tree = self.tree.parse(module)
        assert tree is not None, module
        local: dict[str, list[Any]] = {}
        typer = Typer(self.tree, module, local)
        self._bind_imports(typer, tree)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                self._class(module, node, local)
            elif isinstance(node, FUNCTIONS):
                self._function(module, node, None, local)
            else:
                self._uses(Typer(self.tree, module, local), node)

    def _bind_imports(self, typer: Typer, node: Any) -> None:
        """Imports inside functions are names too."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom) and inner.level == 0 and inner.module:
                for alias in inner.names:
                    found = typer.of(self.tree.find(inner.module, alias.name))
                    if found is not None:
                        typer.variables.setdefault(alias.asname or alias.name, [found])

    def _class(self, module: str, node: ast.ClassDef, local: dict[str, list[Any]]) -> None:
        owner = self.tree.find(module, node.name)
        assert owner is not None
        bases = self._upstream_bases(owner)
        own = [c for c in self.tree.mro(owner) if not is_theirs(c.module)]
        offered = frozenset(name for c in own for name in self.tree.members(c))
        for base in bases:
            need = self.need(self.key_of(base), f"{module}:{node.lineno}")
            if owner.key not in self._inherited:
                need.implements.append((f"{module}:{node.lineno}", offered))
            for name, member in self.tree.members(owner).items():
                if not name.startswith("__"):
                    self._add_own(base, name, member, module)
        for child in (*node.decorator_list, *node.body):
            if isinstance(child, FUNCTIONS):
                self._function(module, child, owner, local)
            else:
                self._uses(Typer(self.tree, module, local), child)

    def _upstream_bases(self, cls: Definition) -> list[Definition]:
        found: list[Definition] = []
        for base in self.tree.bases(cls):
            found += [base] if is_theirs(base.module) else self._upstream_bases(base)
        return found

    def _super_key(self, owner: Definition, name: str) -> str | None:
        """Key of a method that ``super()`` finds; ``None`` if it is no method of vLLM's."""
        bases = self._upstream_bases(owner)
        for base in bases:
            if self.tree.member(base, name) is not None:
                return f"{self.key_of(base)}.{name}"
        return f"{self.key_of(bases[0])}.{name}" if bases and name != "__init__" else None

    def _add_own(self, base: Definition, name: str, member: Any, module: str) -> None:
        node = member.node if member.method is None else member.method
        where = f"{module}:{getattr(node, 'lineno', 0)}"
        is_method = member.method is None and isinstance(member.node, FUNCTIONS)
        names = decorators(member.node) if is_method else set()
        kind = method_kind(names) if is_method else "attribute"
        callable_ = kind not in ("attribute", "property")
        ours = parameters(member.node, bound=kind != "static") if callable_ else None
        need = self.need(f"{self.key_of(base)}.{name}", where, used=False)
        need.overrides.append((ours, kind, where))

    def _function(
        self, module: str, node: Any, owner: Definition | None, local: dict[str, list[Any]]
    ) -> None:
        variables = {**local}
        typer = Typer(self.tree, module, variables, owner)
        for function in (n for n in ast.walk(node) if isinstance(n, FUNCTIONS)):
            is_inner = function is not node
            inner = Typer(self.tree, module, variables, None if is_inner else owner)
            variables.update(parameter_types(inner, function))
        self._bind_imports(typer, node)
        for _ in range(3):  # what a variable is may follow from a later one
            bind_variables(typer, node)
        self._uses(typer, node)

    def _uses(self, typer: Typer, node: Any) -> None:
        for inner in ast.walk(node):
            where = f"{typer.module}:{getattr(inner, 'lineno', 0)}"
            if isinstance(inner, ast.Attribute):
                self._attribute(typer, inner, where)
            if isinstance(inner, ast.Call):
                self._call(typer, inner, where)

    def _attribute(self, typer: Typer, node: ast.Attribute, where: str) -> None:
        told: list[tuple[Definition, str]] = []
        value = typer.expression(node.value)
        typer.found = lambda cls, name: told.append((cls, name))
        typer.expression(node)
        typer.found = None
        for key in self._keys(told):
            self.need(key, where)
        if isinstance(value, Definition) and value.node is None:
            if is_theirs(value.module):
                self.need(f"{value.module}:{node.attr}", where)
        elif value is None and not is_super(node.value):
            self.untyped.setdefault(node.attr, where)

    def _keys(self, told: list[tuple[Definition, str]]) -> list[str]:
        """Keys of members that are vLLM's."""
        keys = []
        for cls, name in told:
            member = self.tree.member(cls, name)
            if name.startswith("__"):
                continue  # Python's own
            if member is None and (name in self.own_names or self.tree.has_foreign_base(cls)):
                continue  # of a subclass of ours, or of a base that is not vLLM's
            if is_theirs(cls.module):
                keys.append(f"{self.key_of(cls)}.{name}")
            elif member is None or is_theirs(member.owner.module):
                key = self._super_key(cls, name)
                keys += [key] if key is not None else []
        return keys

    def _call(self, typer: Typer, node: ast.Call, where: str) -> None:
        call = Call.of(node)
        function = node.func
        if isinstance(function, ast.Attribute) and is_super(function.value):
            key = self._super_key(typer.owner, function.attr) if typer.owner else None
            if key is not None:
                self.need(key, where).calls.setdefault(call, where)
            return
        if isinstance(function, ast.Attribute):
            self._calls_by_name[function.attr].setdefault(call, where)
        called = typer.expression(function)
        if isinstance(called, Bound):
            if called.needs_self:
                call = replace(call, positional=call.positional - 1)
            for key in self._keys([(called.cls, called.member.name)]):
                self.need(key, where).calls.setdefault(call, where)
        elif isinstance(called, Definition) and called.node is not None:
            if is_theirs(called.module):
                self.need(self.key_of(called), where).calls.setdefault(call, where)
            elif called.is_class:
                self._construct(called, call, where)
        if isinstance(function, ast.Name) and function.id == "replace" and node.args:
            changed = typer.expression(node.args[0])
            if isinstance(changed, Instance):
                for keyword in call.keywords:
                    self.need(f"{self.key_of(changed.cls)}.{keyword}", where)

    def _construct(self, cls: Definition, call: Call, where: str) -> None:
        """Fields that an object of a class of ours is made with and vLLM defines."""
        for keyword in call.keywords:
            member = self.tree.member(cls, keyword)
            if member is not None and is_theirs(member.owner.module):
                for key in self._keys([(cls, keyword)]):
                    self.need(key, where)

    def _add_listed(self) -> None:
        where = "tools/contract/relied.py"
        for cls, names in MEMBERS.items():
            for name in names:
                need = self.need(f"{cls}.{name}", where)
                for call, place in self._calls_by_name[name].items():
                    need.calls.setdefault(call, place)
        for key in (*NAMES, *VALUES):
            self.need(key, where)
        for key in ASSUMED:
            self.need(key, where, used=False)


def bind_variables(typer: Typer, node: Any) -> None:
    """Add what assignments, loops and ``isinstance`` say about local variables."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assign) and len(inner.targets) == 1:
            _bind(typer, inner.targets[0], typer.expression(inner.value))
        elif isinstance(inner, ast.AnnAssign):
            _bind(typer, inner.target, typer.assigned(inner))
        elif isinstance(inner, ast.NamedExpr):
            _bind(typer, inner.target, typer.expression(inner.value))
        elif isinstance(inner, ast.For | ast.comprehension):
            _bind_loop(typer, inner)
        elif isinstance(inner, ast.Call) and getattr(inner.func, "id", "") == "isinstance":
            narrowed = typer.tree.dotted(typer.module, inner.args[1])
            is_class = narrowed is not None and narrowed.is_class
            if is_class:
                _bind(typer, inner.args[0], Instance(narrowed))
            elif isinstance(inner.args[0], ast.Name):
                typer.variables[inner.args[0].id] = [None]  # a class that is not in the tree


def _bind_loop(typer: Typer, loop: Any) -> None:
    found = typer.expression(loop.iter)
    if not isinstance(found, Many):
        return
    target = loop.target
    if found.is_mapping and isinstance(target, ast.Tuple):
        target = target.elts[-1]  # the value; keys are plain in what we loop over
    elif found.is_mapping and not ast.unparse(loop.iter).endswith(".values()"):
        return
    _bind(typer, target, found.element)


def _bind(typer: Typer, target: Any, found: Any) -> None:
    if isinstance(target, ast.Name) and found is not None:
        known = typer.variables.setdefault(target.id, [])
        if found not in known and None not in known:
            known.append(found)


def is_super(node: Any) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"


def method_kind(names: set[str]) -> str:
    """How a method is bound, by the names of its decorators."""
    for name, kind in (("staticmethod", "static"), ("classmethod", "class")):
        if name in names:
            return kind
    return "property" if names & {"property", "cached_property"} else "method"
