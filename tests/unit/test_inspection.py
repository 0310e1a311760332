"""What ``vllm-sepllm inspect`` says of each policy, and how much of a text it shows where."""

import contextlib
import html
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from inspection_pages import read_page
from rich.cells import chop_cells
from typer.testing import CliRunner

from vllm_sepllm.cli import common
from vllm_sepllm.cli import main as cli

pytestmark = pytest.mark.unit

MODEL = Path(__file__).parents[2] / "examples" / "models" / "pg19-5m-sep"
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
BOOK = "".join(f"Line {i}, with some words; and more of them.\n" for i in range(400))
CHINESE = "他说，总会来的。我们等了很久，天黑了。" * 20  # noqa: RUF001


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "PAGER", "LESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def page(tokenizer, pythia, monkeypatch, tmp_path):
    """Run the command on a text; returns what it prints and the HTML page."""
    monkeypatch.setattr(cli, "load_tokenizer", {"pythia": pythia, str(MODEL): tokenizer}.get)
    target = tmp_path / "page.html"

    def run(text, *options, flags=(), model=MODEL):
        pairs = [part for option in options for part in ("-o", option)]
        command = ["inspect", "--model", str(model), "--text", "-", "--html", str(target)]
        result = CliRunner().invoke(cli.app, [*command, *pairs, *flags], input=text.encode())
        assert result.exit_code == 0, result.output
        return result.output, target.read_text(encoding="utf-8")

    return run


def kinds_of(source: str) -> list[tuple[str, str]]:
    """CSS class and name of each token on a page, as the last one sees it."""
    return read_page(source).kinds()


def legend_of(source: str) -> dict[str, str]:
    return read_page(source).legend


def row(output: str, what: str) -> str:
    [value] = re.findall(rf"│\s*{re.escape(what)}\s*│\s*(.*?)\s*│", output)
    return value


def test_streaming_has_no_class_between_sinks_and_window(page, tokenizer):
    output, source = page(BOOK[:500], "policy=streaming", "window_size=20")
    kinds = kinds_of(source)
    middle = len(kinds) - 24
    assert (
        kinds
        == [("sink", "sink")] * 4 + [("dropped", "dropped")] * middle + [("window", "window")] * 20
    )
    assert set(legend_of(source)) == {"sink"}
    assert "StreamingLLM: 4 sinks, window of 20\n" in output
    assert "separator" not in output
    assert read_page(source).data["isStreaming"]
    assert row(output, "dropped") == str(middle)
    assert "(1 kept + " in row(output, "pages of 32 tokens, StreamingLLM")
    assert "<title>StreamingLLM on" in source


def test_fixed_interval_shows_every_so_many_tokens(page):
    output, source = page(BOOK[:500], "policy=fixed_interval", "interval=7", "window_size=20")
    kinds = [kind for kind, _ in kinds_of(source)]
    start = len(kinds) - 20
    chosen = [i for i, kind in enumerate(kinds) if kind == "chosen"]
    assert chosen == [i for i in range(4, start) if i % 7 == 0]
    assert set(legend_of(source)) == {"sink", "interval"}
    assert "multiple of 7" in legend_of(source)["interval"]
    assert ("chosen", "interval") in kinds_of(source)
    assert "FixLLM: 4 sinks, window of 20, one token of every 7\n" in output
    assert row(output, "kept by the interval outside the window") == str(len(chosen))
    assert "separator" not in output


SUMS = "Anna sold 48 clips to friends in April, and then half as many clips in May. " * 8


def test_classes_have_colours_of_their_own(page):
    keep = 'keep=["separators", "digits", "capitalized", " in"]'
    output, source = page(SUMS, keep, "window_size=20")
    for line in (
        "token of digits outside the window, seen all the same",
        "token with a capital letter first outside the window",
        "token that keep lists outside the window",
        "tokens of digits in the vocabulary",
    ):
        assert line in output
    found = kinds_of(source)
    assert {name for _, name in found} == {
        *("sink", "separator", "digits", "capitalized", "listed", "window", "dropped")
    }
    assert {css for css, name in found if name == "digits"} == {"class0"}
    assert {css for css, name in found if name == "separator"} == {"chosen"}
    digits = [name for _, name in found].count("digits")
    assert re.search(rf"tokens of digits outside the window\D+{digits}\b", output)


def test_what_is_kept_behind_others_has_a_colour_too(page):
    options = 'keep=["separators", "digits", " in"]', 'keep_after={"digits": 2, " in": 1}'
    output, source = page(SUMS, *options, "window_size=20")
    assert "2 tokens behind digits, 1 token behind ' in'" in " ".join(output.split())
    assert "at most 2 tokens behind such a token and outside the window" in output
    found = kinds_of(source)
    behind = [name for _, name in found].count("behind")
    assert behind > 0
    assert re.search(rf"tokens behind them outside the window\D+{behind}\b", output)
    plain, _ = page(SUMS, options[0], "window_size=20")
    assert "behind such" not in plain


def test_listed_texts_that_are_no_tokens_are_named(page):
    output, source = page(SUMS, 'keep=["separators", " in", "zebra crossing"]', "window_size=20")
    assert "not among this tokenizer's tokens: 'zebra crossing'" in " ".join(output.split())
    assert "&#x27;zebra crossing&#x27;" in source


def test_a_class_that_is_not_kept_is_not_named(page):
    output, _ = page(SUMS, 'keep=["digits"]', "window_size=20")
    assert "separator" not in output
    assert "capital" not in output


def test_a_keep_class_of_ones_own(page, added_class):
    output, source = page("A well-known tune. " * 30, f'keep=["{added_class}"]', "window_size=20")
    assert "token with a hyphen outside the window" in output
    assert "hyphenated" in {name for _, name in kinds_of(source)}


def test_a_policy_of_ones_own(page, added_policy):
    output, source = page(BOOK[:500], f"policy={added_policy}", "window_size=20")
    ids = read_page(source).data["ids"]
    kinds = [kind for kind, _ in kinds_of(source)]
    assert [kind == "chosen" for kind in kinds[4:-20]] == [i % 2 == 0 for i in ids[4:-20]]
    assert set(legend_of(source)) == {"sink", "even id"}
    assert "an even id outside the window" in legend_of(source)["even id"]
    assert "EvenTokens: 4 sinks, window of 20\n" in output
    assert row(output, "even ids outside the window") == str(kinds.count("chosen"))


def test_a_bound_and_cache_positions(page):
    options = "max_separator_tokens=3", "position_mode=cache", "window_size=20"
    output, source = page(BOOK, *options, flags=["--full"])
    kinds = [kind for kind, _ in kinds_of(source)]
    assert kinds.count("chosen") == 3
    assert "one of the 3 newest separators" in legend_of(source)["separator"]
    assert "the 3 newest of a text seen, positions of the cache\n" in output
    assert row(output, "cache position of the last token") == str(4 + 3 + 20 - 1)
    assert "cache position" not in page(BOOK, "window_size=20")[0]


def test_separator_token_ids_are_taken_as_they_are(page, tokenizer):
    comma = tokenizer.convert_tokens_to_ids(",")
    output, source = page(BOOK, f"separator_token_ids=[{comma}]", "window_size=20")
    ids = read_page(source).data["ids"]
    kinds = [kind for kind, _ in kinds_of(source)]
    seen = {i for i, kind in zip(ids, kinds, strict=True) if kind == "chosen"}
    assert seen == {comma}
    assert "1 separators in the vocabulary" in output


NAMES = ("sink", "separator", "window", "dropped")
NOTHING = "StreamingLLM in effect"


def test_separators_that_a_text_does_not_have_are_reported(page):
    output, source = page(CHINESE, "window_size=20")
    [sentence] = [line for line in output.splitlines() if NOTHING in line]
    assert "only 0 of the " in sentence
    assert "are separators (under 2%)" in sentence
    assert "no list of separators helps" in sentence  # this tokenizer has no such tokens
    assert "-o policy=fixed_interval" in sentence
    assert f'<p class="notice">{html.escape(sentence)}</p>' in source


@pytest.mark.parametrize(
    ("text", "options", "remedy"),
    [
        (CHINESE, [], ['["default", "cjk"]']),
        (CHINESE, ['separators=["—"]'], ['["—", "cjk"]']),
        (CHINESE, ["separator_token_ids=[15]"], ["drop separator_token_ids, and", '"cjk"']),
        ('f("x") + g("y") - h("z") ' * 30, [], ["-o separator_match=composed"]),
    ],
)
def test_the_remedy_is_one_that_keeps_more(page, text, options, remedy):
    output, _ = page(text, "window_size=20", *options, model="pythia")
    [sentence] = [line for line in output.splitlines() if NOTHING in line]
    for part in remedy:
        assert part in sentence
    promised = re.search(r"keeps ([\d.]+%) of them", sentence)[1]
    advice = re.findall(r"(separators=\[.*?\])", sentence)
    if "separator_match" in sentence:
        advice.append("separator_match=composed")
    output, _ = page(text, "window_size=20", *advice, model="pythia")
    assert NOTHING not in output
    between = int(row(output, "tokens").replace(",", "")) - 24
    kept = int(row(output, "separators outside the window").replace(",", ""))
    assert f"{kept / between:.1%}" == promised


def test_separators_that_are_no_token_are_named(page):
    output, _ = page(BOOK, 'separators=["default", "。", "<nope>", "cjk", "."]')
    [sentence] = [line for line in output.splitlines() if "<nope>" in line]
    assert "tokens: '。', '<nope>', 9 texts of 'cjk'; nothing is kept for them" in sentence
    assert "not among this tokenizer's tokens" not in page(BOOK)[0]


@pytest.mark.parametrize(
    "options",
    [
        ["separator_token_ids=[]"],  # asked for
        ["policy=streaming"],
        ["policy=fixed_interval", "interval=1000"],
    ],
)
def test_who_asks_for_nothing_is_not_told_that_nothing_is_kept(page, options):
    assert NOTHING not in page(CHINESE, "window_size=20", *options)[0]


def test_the_bound_is_not_taken_for_a_lack_of_separators(page):
    output, _ = page(BOOK, "window_size=20", "max_separator_tokens=1")
    assert row(output, "separators outside the window") == "1"
    assert NOTHING not in output


def test_one_separator_of_fifty_tokens_is_the_threshold(page, tokenizer):
    comma = tokenizer.convert_tokens_to_ids(",")
    options = f"separator_token_ids=[{comma}]", "window_size=1", "num_sink_tokens=0"
    word = tokenizer.encode(" the", add_special_tokens=False)
    assert len(word) == 1

    def output(words):  # <s>, the comma, so many words, of which the last is the window
        return page("," + " the" * words, *options)[0]

    assert NOTHING not in output(48 + 1)
    assert NOTHING in output(49 + 1)
    assert NOTHING not in page(" the" * 31, *options)[0]  # too short to say


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def in_terminal(tokenizer, monkeypatch):
    """Run the command on a text in a terminal; returns the lines it shows and the raw output."""
    monkeypatch.setattr(cli, "load_tokenizer", lambda model: tokenizer)
    monkeypatch.setenv("PAGER", "")

    def run(text, *flags, rows=24, columns=80):
        monkeypatch.setenv("LINES", str(rows))
        monkeypatch.setenv("COLUMNS", str(columns))
        stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
        screen = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", stdin)
            patch.setattr(sys, "stdout", screen)
            cli.app(
                ["inspect", "--model", "m", "--text", "-", "-o", "window_size=8", *flags],
                standalone_mode=False,
            )
        run.screen = screen
        lines = ESCAPE.sub("", screen.getvalue()).split("\n")[:-1]
        assert "\x1b" not in "".join(lines)
        return [row for line in lines for row in chop_cells(line, columns) or [""]]

    return run


@pytest.mark.parametrize(("rows", "columns"), [(24, 80), (25, 79), (50, 132), (40, 70), (200, 80)])
def test_a_book_fits_into_the_terminal_with_its_summary(in_terminal, rows, columns):
    lines = in_terminal(BOOK, rows=rows, columns=columns)
    assert rows - 4 < len(lines) < rows  # the last row is the next prompt's
    assert lines[0].startswith("<s>Line 0,")
    assert "full attention" in lines[-2]
    [gap] = [i for i, line in enumerate(lines) if "tokens not shown, --full shows all" in line]
    assert lines[gap + 1 :] != []
    assert any("words; and more of them." in line for line in lines[gap + 1 :])
    head, tail = gap, lines.index("") - gap - 1
    assert abs(head - tail) <= 2


@pytest.mark.parametrize("rows", [1, 5, 10])
def test_a_low_terminal_ends_with_the_summary(in_terminal, rows):
    lines = in_terminal(BOOK, rows=rows)
    assert lines[0].startswith("<s>Line 0,")
    assert len(lines) < 24
    assert "full attention" in lines[-2]


def test_a_text_that_fits_is_shown_whole(in_terminal):
    lines = in_terminal("One, two, three, four.\nFive, six, seven, eight, nine, ten.\n" * 2)
    assert lines[:4] == [
        "<s>One, two, three, four.↵",
        "Five, six, seven, eight, nine, ten.↵",
        "One, two, three, four.↵",
        "Five, six, seven, eight, nine, ten.↵",
    ]
    assert "not shown" not in "".join(lines)
    assert not any("--html" in line for line in lines)  # there are colours


def test_wide_characters_take_two_cells(in_terminal):
    assert 26 < len(in_terminal(CHINESE * 10, rows=30)) < 30


@pytest.mark.parametrize(
    ("texts", "rows", "width", "expected"),
    [
        (["abcd"] * 9, 1, 8, 2),
        (["abcd"] * 9, 2, 8, 4),
        (["abcd"] * 9, 2, 7, 3),
        (["a\n"] * 9, 3, 8, 2),  # the third begins a fourth row, even if nothing is in it
        (["日"] * 9, 1, 5, 2),
        (["a\t", "b"] * 9, 1, 16, 3),
        (["abcd" * 9], 1, 8, 0),
        ([""] * 5, 1, 8, 5),
        ([], 1, 8, 0),
    ],
)
def test_num_fitting(texts, rows, width, expected):
    from vllm_sepllm.cli.inspection_terminal import num_fitting

    assert num_fitting(texts, rows, width) == expected


def test_a_narrow_terminal_shows_every_word_of_the_summary(in_terminal):
    lines = in_terminal(BOOK, rows=60, columns=20)
    assert "full attention: " in "".join(lines)
    assert "seen by the last tok" in "".join(lines)
    assert "…" not in "".join(lines[lines.index("") :])


def test_full_shows_all_in_a_terminal(in_terminal):
    assert "Line 399, with some words; and more of them.↵" in in_terminal(BOOK, "--full")
    assert sum(line.startswith("Line") for line in in_terminal(BOOK, "--full")) == 399


def test_full_shows_all_in_a_pipe_and_on_a_page(page):
    output, source = page(BOOK, flags=["--full"])
    assert output.count("and more of them.↵\n") == 400
    assert source.count("↵\n") == 400
    assert "not shown" not in output + source


def test_a_pipe_does_not_depend_on_the_terminal(page, monkeypatch):
    outputs = set()
    for rows in ("10", "100"):
        monkeypatch.setenv("LINES", rows)
        outputs.add(page(BOOK)[0])
    [output] = outputs
    shown = re.search(r"… ([\d,]+) tokens not shown", output)
    assert int(shown[1].replace(",", "")) == int(row(output, "tokens").replace(",", "")) - 2000


def test_full_goes_through_the_pager_and_the_summary_does_not(in_terminal, tmp_path, monkeypatch):
    seen, script = tmp_path / "seen", tmp_path / "pager.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "data = sys.stdin.buffer.read()\n"
        "pathlib.Path(sys.argv[1]).write_bytes(os.environ['LESS'].encode() + b'\\n' + data)\n"
    )
    command = shlex.join([sys.executable, str(script), str(seen)])
    run = in_terminal
    monkeypatch.setenv("PAGER", command)
    lines = run(BOOK, "--full")
    assert len(lines) < 24
    assert "full attention" in lines[-2]
    paged = seen.read_text(encoding="utf-8")
    assert paged.startswith("R\n")
    assert "\x1b[" in paged
    plain = ESCAPE.sub("", paged)
    assert plain.count("and more of them.↵\n") == 400
    assert " separator  separator outside the window" in plain


@pytest.mark.parametrize("pager", ["", "no-such-program-anywhere", "less 'half", "/"])
def test_no_usable_pager(in_terminal, monkeypatch, pager):
    monkeypatch.setenv("PAGER", pager)
    assert sum(line.startswith("Line") for line in in_terminal(BOOK, "--full")) == 399


def test_a_pager_that_is_left_at_once(in_terminal, monkeypatch):
    monkeypatch.setenv("PAGER", "true")
    assert "full attention" in in_terminal(BOOK * 4, "--full")[-2]


def test_no_pager_into_a_pipe(page, monkeypatch):
    monkeypatch.setenv("PAGER", "false")
    assert "Line 399" in page(BOOK, flags=["--full"])[0]


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "xterm")])
def test_with_few_colours_the_classes_still_differ(in_terminal, monkeypatch, name, value):
    monkeypatch.delenv("COLORTERM", raising=False)
    monkeypatch.setenv(name, value)
    in_terminal(BOOK)
    raw = in_terminal.screen.getvalue()
    styles = {name: re.search(rf"\x1b\[([0-9;]*)m {name} ", raw)[1] for name in NAMES}
    assert len(set(styles.values())) == 4
    codes = {code for style in styles.values() for code in style.split(";")}
    assert not codes & {"30", "38", "48", "90"}


def test_output_without_colours_says_where_they_are(page):
    assert "--html" in page(BOOK)[0].split("wrote")[0]


def test_a_whole_book_is_a_page_in_parts(page):
    _, source = page(BOOK, flags=["--full"])
    parts = re.findall(r'<div class="part">(.*?)</div>', source, re.S)
    assert len(parts) > 5
    for part in parts[:-1]:
        assert 500 <= part.count("<span") < 600
        assert part.endswith("↵\n</span>")
    assert "content-visibility: auto" in source
    page_read = read_page(source)
    assert len(page_read.texts) == len(page_read.data["ids"]) == len(page_read.data["kept"])


def test_a_line_without_end_is_cut_too(page):
    _, source = page(BOOK.replace("\n", " "), flags=["--full"])
    parts = re.findall(r'<div class="part">(.*?)</div>', source, re.S)
    assert [part.count("<span") for part in parts[:-1]] == [1000] * (len(parts) - 1)


def test_a_page_has_the_beginning_and_says_so(page, monkeypatch):
    output, source = page(BOOK, flags=["--limit", "50"])
    total = row(output, "tokens")
    assert len(read_page(source).texts) == 50
    assert f"this page has the first 50 of {total} tokens" in source
    assert "--limit 0" in source
    whole, everything = (read_page(page(BOOK, flags=flags)[1]) for flags in ([], ["--full"]))
    assert whole.texts == everything.texts
    assert read_page(source).texts == whole.texts[:50]
    assert read_page(source).data["kept"] == whole.data["kept"][:50]
    monkeypatch.setattr(cli, "ON_A_PAGE", 60)
    assert len(read_page(page(BOOK)[1]).texts) == 60


def test_a_page_says_bytes_where_the_model_does(page):
    shape = "kept", "dense"
    assert read_page(page(BOOK)[1]).data["bytesPerPage"] == dict(
        zip(shape, (2 * 6 * 4 * 32 * 2 * 32, 0), strict=True)
    )
    found = read_page(page(BOOK, "dense_layers=[0, -1]")[1]).data["bytesPerPage"]
    assert found == dict(
        zip(shape, (2 * 4 * 4 * 32 * 2 * 32, 2 * 2 * 4 * 32 * 2 * 32), strict=True)
    )
    assert read_page(page(BOOK, model="pythia")[1]).data["bytesPerPage"] is None


def test_a_page_never_replaces_the_text(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "load_tokenizer", lambda model: tokenizer)
    file = tmp_path / "text"
    file.write_text(BOOK)
    link = tmp_path / "link"
    link.symlink_to(file)
    command = ["inspect", "--model", "m", "--text", str(file), "--html", str(link)]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    assert "is the text itself" in result.stderr
    assert file.read_text() == BOOK


def test_a_file_without_end(monkeypatch):
    monkeypatch.setattr(common, "MAX_TEXT", 1000)
    monkeypatch.setattr(cli, "load_tokenizer", lambda model: pytest.fail("came too far"))
    result = CliRunner().invoke(cli.app, ["inspect", "--model", "m", "--text", "/dev/zero"])
    assert result.exit_code == 2
    assert "more than 1,000 bytes" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def status_into(tokenizer, monkeypatch):
    """Run the command with a file as standard output; returns the exit status."""
    monkeypatch.setattr(cli, "load_tokenizer", lambda model: tokenizer)

    def run(path, encoding="utf-8"):
        file = open(path, "w", encoding=encoding)  # noqa: SIM115 - closing /dev/full fails
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            with pytest.raises(SystemExit) as left:
                cli.app(["inspect", "--model", "m"])
        with contextlib.suppress(OSError):
            file.close()
        return left.value.code

    return run


def test_an_encoding_that_lacks_characters(status_into, tmp_path):
    assert status_into(tmp_path / "out", "ascii") == 0
    text = (tmp_path / "out").read_text(encoding="ascii")
    assert "<s>Call me Ishmael." in text
    assert "full attention" in text


def test_an_output_that_is_full(status_into, capsys):
    assert status_into("/dev/full") == 2
    assert capsys.readouterr().err == (
        "vllm-sepllm: standard output cannot be written (No space left on device): give it a place"
        " with room\n"
    )
