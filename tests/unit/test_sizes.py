"""Files, functions and kernels stay small enough to be read at once."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
FILES = sorted([*(ROOT / "vllm_sepllm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
FILE_LINES, FUNCTION_LINES, KERNEL_LINES, KERNEL_PARAMETERS = 350, 60, 150, 30


def functions(tree):
    """Name, lines without the docstring, parameters, and whether it is a kernel."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            lines = node.end_lineno - node.lineno + 1 - len(docstring.splitlines())
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            is_kernel = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            yield node.name, lines, len(arguments), is_kernel


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_sizes(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE_LINES
    for name, lines, parameters, is_kernel in functions(ast.parse(text)):
        assert lines <= (KERNEL_LINES if is_kernel else FUNCTION_LINES), name
        assert not is_kernel or parameters <= KERNEL_PARAMETERS, name
