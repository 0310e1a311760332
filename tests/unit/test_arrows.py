"""What may import what: the rooms of the house stay apart, and nothing goes round in a circle."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PACKAGES = {"vllm_sepllm": ROOT / "vllm_sepllm", "sepllm_kernels": ROOT / "kernels/sepllm_kernels"}
# A room, and what modules in it never import. The longest name that fits is a module's room.
CLOSED = {
    "sepllm_kernels": ("vllm", "vllm_sepllm", "transformers"),
    "vllm_sepllm": ("vllm", "sepllm_kernels", "vllm_sepllm.oracle"),
    "vllm_sepllm.cli": ("vllm", "sepllm_kernels"),
    "vllm_sepllm.oracle": ("vllm", "sepllm_kernels", "vllm_sepllm"),  # independent of the rule too
    "vllm_sepllm.training": ("vllm", "vllm_sepllm.engine", "vllm_sepllm.baselines"),
    "vllm_sepllm.baselines": ("vllm", "vllm_sepllm.engine", "vllm_sepllm.training"),
    "vllm_sepllm.evaluation": ("vllm", "sepllm_kernels", "vllm_sepllm.training"),
    "vllm_sepllm.engine": (
        "vllm_sepllm.cli",
        "vllm_sepllm.oracle",
        "vllm_sepllm.training",
        "vllm_sepllm.baselines",
        "vllm_sepllm.evaluation",
    ),
    "vllm_sepllm.engine.startup": ("vllm_sepllm.engine.scheduling", "vllm_sepllm.engine.worker"),
    "vllm_sepllm.engine.scheduling": ("vllm_sepllm.engine.worker",),
    "vllm_sepllm.engine.worker": ("vllm_sepllm.engine.cpu", "vllm_sepllm.engine.gpu"),
    "vllm_sepllm.engine.cpu": ("vllm_sepllm.engine.gpu",),
    "vllm_sepllm.engine.gpu": ("vllm_sepllm.engine.cpu",),
}
FIRST = ("registration", "names", "compat")


def is_in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST) -> Iterator[str]:
    """Modules that a module imports when it runs, inside functions too."""
    for child in ast.iter_child_nodes(node):
        if is_for_types(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative"
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                yield name if name in modules() else str(child.module)
        yield from imports(child)


@cache
def arrows() -> dict[str, frozenset[str]]:
    found = {}
    for name, path in modules().items():
        found[name] = frozenset(imports(ast.parse(path.read_text(encoding="utf-8"))))
    return found


def room_of(module: str) -> str:
    return max((room for room in CLOSED if is_in(module, room)), key=len)


def wrong_arrows(module: str, imported: frozenset[str]) -> list[str]:
    """What a module imports from behind a closed door. Its own room is open to it."""
    own = room_of(module)
    closed = set(CLOSED[own])
    if is_in(own, "vllm_sepllm.engine"):
        closed |= set(CLOSED["vllm_sepllm.engine"])
    outside = [name for name in imported if not is_in(name, own)]
    return [name for name in outside if any(is_in(name, room) for room in closed)]


@pytest.mark.parametrize("module", modules())
def test_rooms_are_closed(module):
    assert not wrong_arrows(module, arrows()[module])


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("vllm_sepllm.engine.cpu.plan", "vllm_sepllm.engine.gpu.counts"),
        ("vllm_sepllm.engine.worker.worker", "vllm_sepllm.engine.cpu.counts"),
        ("vllm_sepllm.engine.startup.checks", "vllm_sepllm.oracle.dense_mask"),
        ("vllm_sepllm.oracle.dense_mask", "vllm_sepllm.policy"),
        ("vllm_sepllm.planning", "vllm.config"),
        ("sepllm_kernels.batch", "vllm_sepllm.policy"),
    ],
)
def test_a_wrong_arrow_is_found(module, imported):
    assert wrong_arrows(module, frozenset({imported})) == [imported]


def test_what_vllm_imports_first_imports_little():
    """vLLM asks for plugins in the middle of its own imports."""
    for name in FIRST:
        tree = ast.parse(modules()[f"vllm_sepllm.engine.{name}"].read_text(encoding="utf-8"))
        at_once = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        plain = [node for node in tree.body if isinstance(node, ast.Import)]
        at_once += [each.name for node in plain for each in node.names]
        assert not [module for module in at_once if is_in(module, "vllm")]
        assert {m for m in at_once if is_in(m, "vllm_sepllm")} <= {"vllm_sepllm.engine.names"}


def test_no_circles():
    """Depth first; a module that is met again on its own path closes a circle."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for imported in sorted(arrows()[module] & modules().keys()):
            visit(imported, (*path, module))
        done.add(module)

    for module in modules():
        visit(module, ())
    assert done == set(modules())


def test_the_rooms_are_there():
    """A rule for a room that was renamed would hold for nothing."""
    assert set(CLOSED) <= {*modules()}
