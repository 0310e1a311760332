"""What the documentation points at is there, and the picture is the one that is drawn."""

import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT

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


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300


def test_the_picture_is_drawn(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "scripts")])
    import draw_picture

    assert draw_picture.PICTURE.read_text(encoding="utf-8") == draw_picture.draw()
    assert draw_picture.draw().count('class="page freed"') == 4
