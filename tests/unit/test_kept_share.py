"""The tables of ``docs/separators.md`` are those of ``benchmarks/kept_share.py``."""

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kept_share():
    pytest.importorskip("transformers", reason="needs transformers")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import kept_share

    sys.path.remove(str(ROOT / "benchmarks"))
    return kept_share


def tables(page: str) -> list[tuple[str, list[list[str]]]]:
    """Tokenizer and cells of each table of shares."""
    found = re.findall(r"^`([^`]+)` \([\d,]+ tokens\), in %:\n\n((?:\|.*\n?)+)", page, re.M)
    return [
        (name, [[cell.strip() for cell in line.strip("|").split("|")] for line in rows.split("\n")])
        for name, rows in ((name, rows.strip()) for name, rows in found)
    ]


# Files of this repository, which change a little all the time.
CHANGING = "Python code", "JSON", "Markdown"


def test_the_tables_in_the_docs_are_what_the_command_prints(kept_share):
    shown = tables((ROOT / "docs/separators.md").read_text(encoding="utf-8"))
    assert [name for name, _ in shown] == list(kept_share.TOKENIZERS)
    found = kept_share.texts()
    for name, cells in shown:
        tokenizer = kept_share.load(name)
        printed = kept_share.markdown(name, tokenizer, kept_share.measure(tokenizer, found))
        [(_, now)] = tables(printed)
        assert len(now) == len(cells) == 16
        assert cells[:2] == now[:2]
        for line, expected in zip(cells, now, strict=True):
            assert line[:2] == expected[:2]
            for cell, value in zip(line[2:], expected[2:], strict=True):
                if line[0] in CHANGING and value.replace(".", "").isdigit():
                    assert abs(float(cell) - float(value)) <= 1, (name, line, expected)
                else:
                    assert cell == value, (name, line, expected)


def test_a_tokenizer_is_a_folder_or_a_file(kept_share, tmp_path):
    folder = ROOT / kept_share.TOKENIZERS[0]
    packed = tmp_path / "tokenizer.json.gz"
    packed.write_bytes(gzip.compress((folder / "tokenizer.json").read_bytes()))
    text = [kept_share.Text("a", "code", "One, f[two](three)[four].\n" * 20)]
    paths = folder, folder / "tokenizer.json", packed
    rows = [kept_share.measure(kept_share.load(str(path)), text) for path in paths]
    assert rows[0] == rows[1] == rows[2]
    [row] = rows[0]
    assert 0 < row["default"] < row["+ list"] < 1


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x1f\x8b\xff"])
def test_a_tokenizer_that_cannot_be_loaded(kept_share, tmp_path, content):
    path = tmp_path / "tokenizer.json.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be loaded .*: give a folder") as error:
        kept_share.load(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_refuses_with_one_sentence(kept_share, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kept_share.py", "/nowhere"])
    with pytest.raises(SystemExit) as left:
        kept_share.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(
        "kept_share.py: tokenizer '/nowhere' cannot be loaded"
    )


def test_nothing_heavy_is_imported_for_help():
    command = [sys.executable, str(ROOT / "benchmarks/kept_share.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tokenizer.json" in done.stdout
