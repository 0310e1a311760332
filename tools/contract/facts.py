"""What a version of vLLM offers for each need, as plain data that a snapshot can hold."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from contract.signatures import constructor, parameters
from contract.source import FUNCTIONS, Definition, Tree, decorators
from contract.usage import method_kind

SNAPSHOTS = Path(__file__).parent / "snapshots"

Fact = dict[str, Any] | None  # None: this version has no such name
Facts = dict[str, Fact]


def describe_all(tree: Tree, keys: Iterable[str]) -> Facts:
    """Facts of a version, by key, in the order of keys."""
    return {key: describe(tree, key) for key in sorted(keys)}


def describe(tree: Tree, key: str) -> Fact:
    """The fact for ``module:Name`` or ``module:Class.member``."""
    module, _, rest = key.partition(":")
    name, _, member = rest.partition(".")
    found = tree.find(module, name)
    if found is None and member:  # a class we do not import ourselves may have moved
        found = tree.search_class(module.partition(".")[0], name)
    if found is None:
        return None
    if not member:
        return _definition(tree, found)
    return _member(tree, found, member) if found.is_class else None


def _definition(tree: Tree, found: Definition) -> Fact:
    node = found.node
    if node is None:
        return {"is": "module"}
    if found.is_class:
        signature = [str(p) for p in constructor(tree, found)]
        return {"is": "class", "call": signature, "abstract": sorted(_abstract(tree, found))}
    if isinstance(node, FUNCTIONS):
        signature = [str(p) for p in parameters(node, bound=False)]
        return {"is": "function", "call": signature, "body": digest(tree, found.module, node)}
    value = getattr(node, "value", None)
    constant = isinstance(value, ast.Constant)
    return {"is": "value", **({"value": value.value} if constant else {})}


def _abstract(tree: Tree, cls: Definition) -> set[str]:
    found: set[str] = set()
    for owner in reversed(tree.mro(cls)):
        for name, member in tree.members(owner).items():
            is_abstract = member.method is None and "abstractmethod" in decorators(member.node)
            found = found | {name} if is_abstract else found - {name}
    return found


def _member(tree: Tree, cls: Definition, name: str) -> Fact:
    member = tree.member(cls, name)
    if member is None:
        return None
    place = {"in": member.owner.key}
    if member.method is None and isinstance(member.node, FUNCTIONS):
        kind = method_kind(decorators(member.node))
        body = {"body": digest(tree, member.owner.module, member.node)}
        signature = [str(p) for p in parameters(member.node, bound=kind != "static")]
        return {"is": kind, **({} if kind == "property" else {"call": signature}), **body, **place}
    annotation = getattr(member.node, "annotation", None)
    kept = {} if annotation is None else {"type": " ".join(ast.unparse(annotation).split())}
    return {"is": "attribute", **kept, **place}


def digest(tree: Tree, module: str, node: Any) -> str:
    """Short hash of a function's code without comments and docstrings."""
    lines = (tree.text(module) or "").splitlines()
    dropped: set[int] = set()
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            dropped.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    numbers = (i for i in range(node.lineno, node.end_lineno + 1) if i not in dropped)
    code = (lines[i - 1].strip() for i in numbers)
    kept = [line for line in code if line and not line.startswith("#")]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:12]


def snapshot_versions() -> list[str]:
    """Versions there is a snapshot of, oldest first."""
    names = [path.stem for path in SNAPSHOTS.glob("*.json")]
    return sorted(names, key=lambda name: [int(part) for part in name.split(".")])


def load(version: str) -> Facts:
    """The facts in a snapshot."""
    facts: Facts = json.loads((SNAPSHOTS / f"{version}.json").read_text(encoding="utf8"))["facts"]
    return facts


def save(version: str, source: str, facts: Facts) -> None:
    """Write a snapshot, one need a line, so that its history can be read."""
    SNAPSHOTS.mkdir(exist_ok=True)
    lines = [f"    {json.dumps(key)}: {json.dumps(fact)}" for key, fact in sorted(facts.items())]
    head = f'{{\n  "vllm": {json.dumps(version)},\n  "source": {json.dumps(source)},\n'
    text = head + '  "facts": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    (SNAPSHOTS / f"{version}.json").write_text(text, encoding="utf8")
