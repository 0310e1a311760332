"""Signatures read from source, and whether calls and overrides fit them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from contract.source import FUNCTIONS, Definition, Tree, decorators, flat

# Kinds of parameters; a name after "*" may only be given by keyword.
POSITIONAL, KEYWORD, EXTRA_POSITIONAL, EXTRA_KEYWORD = "positional", "keyword", "*", "**"


@dataclass(frozen=True)
class Parameter:
    """One parameter; written as text in a snapshot."""

    name: str
    kind: str
    required: bool

    def __str__(self) -> str:
        mark = {KEYWORD: "kw:", EXTRA_POSITIONAL: "*", EXTRA_KEYWORD: "**"}.get(self.kind, "")
        return f"{mark}{self.name}" + ("" if self.required or mark.startswith("*") else "=")

    @classmethod
    def parse(cls, text: str) -> Parameter:
        name = text.removesuffix("=")
        for mark, kind in (("kw:", KEYWORD), ("**", EXTRA_KEYWORD), ("*", EXTRA_POSITIONAL)):
            if name.startswith(mark):
                required = kind == KEYWORD and name == text
                return cls(name.removeprefix(mark), kind, required)
        return cls(name, POSITIONAL, name == text)


Signature = list[Parameter]


@dataclass(frozen=True)
class Call:
    """Shape of a call: positional arguments, keywords, and whether ``*`` or ``**`` adds more."""

    positional: int = 0
    keywords: tuple[str, ...] = ()
    is_open: bool = False

    @classmethod
    def of(cls, node: ast.Call) -> Call:
        starred = [isinstance(a, ast.Starred) for a in node.args]
        names = [k.arg for k in node.keywords]
        keywords = tuple(n for n in names if n is not None)
        return cls(starred.count(False), keywords, any(starred) or None in names)


def parameters(node: Any, bound: bool) -> Signature:
    """Parameters of a function; without the first if it is a bound method."""
    args = node.args
    plain = args.posonlyargs + args.args
    first_default = len(plain) - len(args.defaults)
    found = [Parameter(a.arg, POSITIONAL, i < first_default) for i, a in enumerate(plain)]
    if args.vararg:
        found.append(Parameter(args.vararg.arg, EXTRA_POSITIONAL, False))
    for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append(Parameter(a.arg, KEYWORD, default is None))
    if args.kwarg:
        found.append(Parameter(args.kwarg.arg, EXTRA_KEYWORD, False))
    return found[1:] if bound else found


def constructor(tree: Tree, cls: Definition) -> Signature:
    """What an object of a class is made from: ``__init__``, or fields of a data class."""
    for owner in tree.mro(cls):
        init = tree.members(owner).get("__init__")
        if init is not None and isinstance(init.node, FUNCTIONS):
            return parameters(init.node, bound=True)
        if _has_fields(tree, owner):
            return list(_fields(tree, cls))
    return []


def _has_fields(tree: Tree, cls: Definition) -> bool:
    names = {getattr(b, "attr", getattr(b, "id", "")) for b in cls.node.bases}
    return bool({"dataclass", "config"} & decorators(cls.node) or {"NamedTuple", "Struct"} & names)


def _fields(tree: Tree, cls: Definition) -> Iterator[Parameter]:
    fields: dict[str, Parameter] = {}
    for owner in reversed(tree.mro(cls)):
        kw_only = any("kw_only=True" in ast.unparse(d) for d in owner.node.decorator_list)
        for node in flat(owner.node.body):
            if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
                continue
            value = ast.unparse(node.value) if node.value is not None else ""
            if "init=False" in value:
                continue
            required = not value or (value.startswith("field(") and "default" not in value)
            kind = KEYWORD if kw_only or "kw_only=True" in value else POSITIONAL
            fields[node.target.id] = Parameter(node.target.id, kind, required)
    yield from fields.values()


def misfit(call: Call, signature: Signature) -> str | None:
    """Why a call does not fit a signature, or ``None``."""
    positional = [p for p in signature if p.kind == POSITIONAL]
    kinds = {p.kind for p in signature}
    if call.positional > len(positional) and EXTRA_POSITIONAL not in kinds:
        return f"takes {len(positional)} positional arguments, {call.positional} are given"
    given = {p.name for p in positional[: call.positional]}
    names = {p.name for p in signature if p.kind in (POSITIONAL, KEYWORD)}
    for keyword in call.keywords:
        if keyword not in names and EXTRA_KEYWORD not in kinds:
            return f"has no parameter {keyword!r}"
        if keyword in given:
            return f"is given {keyword!r} twice"
    given.update(call.keywords)
    for parameter in signature:
        if parameter.required and parameter.name not in given and not call.is_open:
            return f"needs {parameter.name!r}"
    return None


def override_misfit(ours: Signature, theirs: Signature) -> str | None:
    """Why a call made for their method would fail with ours, or ``None``."""
    kinds = {p.kind for p in ours}
    own = [p for p in ours if p.kind == POSITIONAL]
    names = {p.name: p for p in ours if p.kind in (POSITIONAL, KEYWORD)}
    rest = [p for p in theirs if p.kind == POSITIONAL]
    for index, parameter in enumerate(rest):
        if index < len(own):
            if own[index].name != parameter.name:
                return f"{parameter.name!r} is now where ours has {own[index].name!r}"
            if own[index].required and not parameter.required:
                return f"{parameter.name!r} may be left out, ours needs it"
        elif not {EXTRA_POSITIONAL, EXTRA_KEYWORD} <= kinds:
            return f"is called with {parameter.name!r}, which ours does not take"
    for parameter in theirs:
        if parameter.kind == KEYWORD and EXTRA_KEYWORD not in kinds and parameter.name not in names:
            return f"is called with {parameter.name!r}, which ours does not take"
        if parameter.kind in (EXTRA_POSITIONAL, EXTRA_KEYWORD) and parameter.kind not in kinds:
            return f"takes {parameter}, ours does not"
    known = {p.name for p in theirs}
    for parameter in names.values():
        if parameter.required and parameter.name not in known:
            return f"no longer passes {parameter.name!r}, which ours needs"
    return None
