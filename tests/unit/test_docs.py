"""What the documentation points at is there, and the picture is the one that is drawn."""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from helpers import ROOT

from vllm_sepllm.config import SepLLMConfig

pytestmark = pytest.mark.unit

FOLDERS = ("docs", "examples", "kernels", "tests", "vllm_sepllm", "benchmarks")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Its headings, as links name them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} of {page.name}"
        if anchor:
            assert anchor in anchors(file), f"{target} of {page.name}"


def test_links_are_found():
    assert sum(len(LINK.findall(prose(page))) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named(page):
    """Paths in backquotes that begin with a folder of the repository."""
    folders = "|".join((*FOLDERS, "scripts", "tools"))
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", prose(page)):
        assert (ROOT / path).exists(), f"{path} in {page.name}"


def test_tests_that_are_named():
    """By their file alone: each is there."""
    files = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+\.py)`", prose(page))}
    assert len(named) > 20
    for name in named:
        assert name in files


def test_all_options_are_in_the_table():
    """With their defaults, where these are values of one line."""
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", prose(ROOT / "docs/options.md"), re.MULTILINE)
    shown = dict(rows)
    for field in fields(SepLLMConfig):
        default = getattr(SepLLMConfig(), field.name)
        if isinstance(default, (int, str, type(None))):
            assert shown[field.name] == f"`{json.dumps(default)}`", field.name
        else:
            assert field.name in shown


def results(name):
    path = ROOT / "benchmarks/results" / name
    return json.loads(path.read_text(encoding="utf-8"))


def test_figures_of_the_readme_are_those_that_were_measured():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    cpu = {(each["batch"], each["context"]): each for each in results("cpu.json")["results"]}
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|$", readme, re.MULTILINE)
    assert len(rows) == 3
    for context, decoding, blocks in rows:
        case = cpu[8, int(context.replace(",", ""))]
        assert decoding == f"{case['decode_ratio']:.2f}"
        assert blocks == f"{case['blocks']['sepllm'] / case['blocks']['dense']:.2f}"
    ways = results("retrieval.json")["ways"]
    right = {name: sum(row["right"] for row in way["rows"]) for name, way in ways.items()}
    rows = re.findall(r"^\| (\S.*?) \| (\d+) \| \d+ % \|$", readme, re.MULTILINE)
    assert dict(rows) == {
        "everything": str(right["full attention"]),
        "SepLLM": str(right["SepLLM"]),
        "StreamingLLM, window of 855": str(right["StreamingLLM, as much KV as SepLLM"]),
        "StreamingLLM, window of 1,779": str(right["StreamingLLM, as much KV as facts"]),
        'SepLLM, `preset: "facts"`': str(right["facts"]),
    }


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300


def test_the_picture_is_drawn(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "scripts")])
    import draw_picture

    assert draw_picture.PICTURE.read_text(encoding="utf-8") == draw_picture.draw()
    assert draw_picture.draw().count('class="page freed"') == 4
