import base64
import hashlib
import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
from inspection_pages import read_page
from made_tokenizers import ListedWords
from typer.testing import CliRunner

from vllm_sepllm.cli import common, inspection_words
from vllm_sepllm.cli import main as cli
from vllm_sepllm.cli.inspection import TokenClass, classify, summarize, tokenize, visible_text
from vllm_sepllm.config import ConfigError
from vllm_sepllm.policy import KeepRule, table_of

pytestmark = pytest.mark.unit

MODEL = Path(__file__).parents[2] / "examples" / "models" / "pg19-5m-sep"
AWKWARD = 'One, two.\n\n\té 日本 <b>&amp;</b> "x" 😀 <s>: don\'t;\r\nend\x1b[31m?'


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def invoke(tokenizer, monkeypatch):
    """Run a command, without loading the tokenizer each time."""
    monkeypatch.setattr(cli, "load_tokenizer", lambda model: tokenizer)

    def run(*arguments, stdin=None):
        command = ["inspect", "--model", str(MODEL), *map(str, arguments)]
        return CliRunner().invoke(cli.app, command, input=stdin)

    return run


def assert_refused(result, *parts):
    """Exit code 2 and one sentence on standard error."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("vllm-sepllm: ")
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def table_row(output: str, what: str) -> str:
    """The value beside ``what`` in a printed table."""
    [value] = re.findall(rf"[│|]\s*{re.escape(what)}\s*[│|]\s*(.*?)\s*[│|]", output)
    return value


S, P, W, D = TokenClass.SINK, TokenClass.CHOSEN, TokenClass.WINDOW, TokenClass.DROPPED


@pytest.mark.parametrize(
    ("sinks", "window", "expected"),
    [
        (1, 3, [S, D, P, D, D, P, D, W, W, W]),
        (0, 1, [D, D, P, D, D, P, D, P, D, W]),
        (3, 2, [S, S, S, D, D, P, D, P, W, W]),
        (0, 10, [W] * 10),
        (20, 4, [S] * 6 + [W] * 4),
        (2, 99, [W] * 10),
    ],
)
def test_classify(sinks, window, expected):
    ids = [0, 1, 2, 1, 1, 2, 1, 2, 1, 1]
    policy = KeepRule(sinks, window, table_of([2], 3))
    assert classify(ids, policy) == expected
    assert classify([], policy) == []


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (1, [S, D, D, D, D, D, D, P, D, W]),
        (2, [S, D, D, D, D, P, D, P, D, W]),
        (3, [S, D, P, D, D, P, D, P, D, W]),
        (9, [S, D, P, D, D, P, D, P, D, W]),
    ],
)
def test_classify_with_a_bound(bound, expected):
    ids = [2, 1, 2, 1, 1, 2, 1, 2, 1, 1]
    policy = KeepRule(1, 1, table_of([2], 3), max_separator_tokens=bound)
    assert classify(ids, policy) == expected
    # Entries 0 to 3 in pages of one; those between the sink and the bound have left.
    assert summarize(ids, policy, 1).kept_pages == 1 + min(bound, 3)


def test_sinks_and_separators_are_the_stream_below_the_limit():
    ids = [0, 2, 1, 1, 2, 1, 2, 1]
    policy = KeepRule(2, 3, table_of([2], 3))
    kinds = classify(ids, policy)
    prefix = [0, *policy.kept_flags(ids).cumsum()]
    assert kinds.count(S) + kinds.count(P) == prefix[int(policy.window_start(7))] == 3


@pytest.mark.parametrize(
    ("length", "window", "block_size", "pages"),
    [
        (10, 3, 4, (1, 2, 3)),  # window [7, 10): pages 1 and 2
        (10, 2, 4, (1, 1, 3)),
        (10, 1, 1, (4, 1, 10)),
        (8, 4, 4, (1, 1, 2)),
        (8, 5, 4, (1, 2, 2)),
        (1, 99, 4, (1, 1, 1)),
    ],
)
def test_pages(length, window, block_size, pages):
    ids = [0, 1, 2, 1, 1, 2, 1, 2, 1, 1][:length]
    summary = summarize(ids, KeepRule(1, window, table_of([2], 3)), block_size)
    assert (summary.kept_pages, summary.window_pages, summary.full_pages) == pages


@pytest.mark.parametrize("text", [AWKWARD, "é", " x", "<s>", "\n", "日" * 20])
def test_parts_of_the_tokens_are_the_text(tokenizer, text):
    ids, parts = tokenize(tokenizer, text)
    assert ids == tokenizer(text)["input_ids"]
    assert len(parts) == len(ids)
    assert parts[0] == "<s>"  # the tokenizer adds it
    assert "".join(parts[1:]) == text


class RewritingTokenizer(ListedWords):
    """Drops leading and trailing blanks and lower-cases; offsets point into the original."""

    is_fast = True
    words = ("a", "it", "is", " ", "�")

    def __call__(self, text, **kwargs):
        assert text == " IT Is é "
        return {
            "input_ids": [1, 3, 2, 3, 4, 4],
            "special_tokens_mask": [0] * 6,
            "offset_mapping": [(1, 3), (3, 4), (4, 6), (6, 7), (7, 8), (7, 8)],
        }


def test_rewritten_text_is_shown_as_it_was():
    _, parts = tokenize(RewritingTokenizer(), " IT Is é ")
    assert parts == [" IT", " ", "Is", " ", "é", " "]


def test_a_tokenizer_without_offsets_shows_its_own_texts():
    slow = RewritingTokenizer()
    slow.is_fast = False
    _, parts = tokenize(slow, " IT Is é ")
    assert parts == ["it", " ", "is", " ", "�", "�"]


def test_visible_text_leaves_no_control_character():
    shown = visible_text("".join(map(chr, range(0xA0))))
    assert [c for c in shown if (ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0)] == ["\t", "\n"]
    assert "↵\n" in shown
    assert visible_text("a b") == "a b"


def test_inspect_counts_and_pages(invoke, tokenizer, tmp_path):
    file = tmp_path / "text"
    file.write_text("a, b. " * 40, encoding="utf-8")
    result = invoke("--text", file, "-o", "window_size=20", "--block-size", 8)
    assert result.exit_code == 0, result.output
    ids = tokenizer("a, b. " * 40)["input_ids"]
    marks = {tokenizer.convert_tokens_to_ids(t) for t in [".", ",", "Ġ"]}
    old = ids[4:-20]
    separators = sum(i in marks for i in old)
    kept = 4 + sum(i in marks for i in ids[4:])
    assert 0 < separators < len(old)
    assert table_row(result.output, "tokens") == str(len(ids))
    assert table_row(result.output, "sinks") == "4"
    assert table_row(result.output, "separators outside the window") == str(separators)
    assert table_row(result.output, "window") == "20"
    assert table_row(result.output, "dropped") == str(len(old) - separators)
    seen = (24 + separators) / len(ids)
    assert table_row(result.output, "seen by the last token") == f"{seen:.1%}"
    window = {p // 8 for p in range(len(ids) - 20, len(ids))}
    kept_pages = -(-kept // 8)
    assert table_row(result.output, "pages of 8 tokens, SepLLM") == (
        f"{kept_pages + len(window)} ({kept_pages} kept + {len(window)} window)"
    )
    full = table_row(result.output, "pages of 8 tokens, full attention")
    assert full == str(-(-len(ids) // 8))


def test_sample_text_under_a_window_that_covers_it(invoke):
    result = invoke("-o", "window_size=256")
    assert result.exit_code == 0
    assert "Call me Ishmael." in result.output
    assert table_row(result.output, "dropped") == "0"
    assert "nothing is dropped" in result.output
    for name in ("sink", "separator", "window", "dropped"):
        assert f" {name} " in result.output
    assert "nothing is dropped" not in invoke().output  # the sample has a window of its own


def test_standard_input(invoke):
    result = invoke("--text", "-", stdin=b"Well [bold]then[/bold].\nYes\x1b[31m")
    assert result.exit_code == 0
    assert "<s>Well [bold]then[/bold].↵\nYes␛[31m\n" in result.output


@pytest.mark.parametrize(("limit", "shown"), [(1, 1), (2, 2), (7, 7), (0, 86), (500, 86)])
def test_limit_shows_both_ends_and_a_page_the_beginning(invoke, tmp_path, limit, shown):
    page = tmp_path / "page.html"
    result = invoke("--limit", limit, "--html", page)
    found = read_page(page.read_text(encoding="utf-8"))
    assert len(found.texts) == shown
    assert found.texts[0] == "<s>"
    assert (f"{86 - shown} tokens not shown" in result.output) is (shown < 86)
    assert (f"first {shown} of 86 tokens" in found.source) is (shown < 86)
    assert table_row(result.output, "tokens") == "86"


def test_html_holds_the_text_the_classes_and_nothing_from_outside(invoke, tokenizer, tmp_path):
    page = tmp_path / "page.html"
    result = invoke("--text", "-", "--html", page, "-o", "window_size=5", stdin=AWKWARD.encode())
    assert result.exit_code == 0
    assert f"wrote {page}\n" in result.output
    awkward = tmp_path / "a\x1b[31m.html"
    assert f"wrote {tmp_path}/a␛[31m.html\n" in invoke("--html", awkward).output
    source = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|href=|@import|url\(", source)
    found = read_page(source)
    assert found.data["ids"] == tokenizer(AWKWARD)["input_ids"]
    shown = AWKWARD.replace("\x1b", "␛").replace("\r", "␍").replace("\n", "↵\n")
    assert "".join(found.texts) == "<s>" + shown
    kinds = [kind for kind, _ in found.kinds()]
    assert kinds[-5:] == ["window"] * 5
    assert kinds[:4] == ["sink"] * 4
    middle = dict(zip(found.texts[4:-5], kinds[4:-5], strict=True))
    assert middle["."] == middle[" "] == middle["\t"] == "chosen"
    assert "dropped" in middle.values()


def test_only_the_scripts_of_a_page_may_run(invoke, tmp_path):
    page = tmp_path / "page.html"
    assert invoke("--html", page).exit_code == 0
    source = page.read_text(encoding="utf-8")
    [policy] = re.findall(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', source)
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["default-src"] == "'none'"
    for tag, name in (("script", "script-src"), ("style", "style-src")):
        [inline] = re.findall(rf"<{tag}>(.*?)</{tag}>", source, re.S)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert allowed[name] == f"'sha256-{digest}'"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["window_size=0"], ["window_size=0", "at least 1"]),
        (["window_size=big"], ["window_size='big'", "whole number"]),
        (["window_sise=3"], ["'window_sise'", "did you mean 'window_size'"]),
        (["window_size"], ["'window_size'", "KEY=VALUE"]),
        (["=3"], ["'=3'", "KEY=VALUE"]),
        (["window_size=3", "window_size=4"], ["'window_size'", "twice"]),
        (['separators=[".",'], ["separators=", "list"]),
        (["separators=[default,cjk]"], ["separators=", "list", "single quotes"]),
        (['separators=["¶¶"]'], ["no separator found", "¶¶"]),
        (["separator_token_ids=[4096]"], ["4096", "vocabulary size 4096"]),
        (["policy=greedy"], ["policy='greedy'", "'sepllm'", "'streaming'"]),
        (["policy=fixed_interval"], ["without interval"]),
        (["interval=5"], ["interval=5", "policy='sepllm'"]),
        (["max_separator_tokens=0"], ["max_separator_tokens=0", "at least 1"]),
    ],
)
def test_bad_options(invoke, options, parts):
    assert_refused(invoke(*(x for option in options for x in ("-o", option))), *parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--block-size", 0], ["--block-size 0", "at least 1"]),
        (["--limit", -1], ["--limit -1", "at least 0"]),
        (["--limit", 7, "--full"], ["--limit 7", "--full", "drop one"]),
    ],
)
def test_bad_numbers(invoke, flags, parts):
    assert_refused(invoke(*flags), *parts)


def test_bad_texts(invoke, tmp_path):
    missing, binary, empty = tmp_path / "missing", tmp_path / "binary", tmp_path / "empty"
    binary.write_bytes(b"ab\xff\xfe")
    empty.touch()
    assert_refused(invoke("--text", missing), repr(str(missing)), "No such file")
    assert_refused(invoke("--text", tmp_path), "cannot be read", "directory")
    assert_refused(invoke("--text", binary), "not UTF-8 at byte 2")
    assert_refused(invoke("--text", empty), "is empty")
    assert_refused(invoke("--text", "-", stdin=b"\xff"), "standard input is not UTF-8 at byte 0")
    assert_refused(invoke("--text", "-", stdin=b""), "standard input is empty")
    assert_refused(invoke("--text", "a\0b"), "cannot be read")


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(common.InputError, match="standard input is closed"):
        common.read_text("-")


def test_html_that_cannot_be_written(invoke, tmp_path):
    target = tmp_path / "no" / "page.html"
    assert_refused(invoke("--html", target), repr(str(target)), "folder that exists")
    text, long = tmp_path / "text", tmp_path / ("x" * 300)
    text.write_text("One, two.")
    assert_refused(invoke("--html", long, "--text", text), "cannot be written (File name too long)")
    assert_refused(invoke("--html", text, "--text", text), "is the text itself")
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert_refused(invoke("--html", config), "exists and is no page")
    assert config.read_text() == "{}"


def test_a_page_is_replaced(invoke, tmp_path):
    page = tmp_path / "page.html"
    page.touch()
    assert invoke("--html", page).exit_code == 0
    before = page.read_text()
    assert invoke("--html", page, "--limit", 1).exit_code == 0
    assert page.read_text() != before
    assert_refused(invoke("--html", tmp_path), "Is a directory", "with room for it")


def test_a_terminal_of_no_columns(invoke, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    assert "seen by the last token" in invoke().output


def test_a_rule_that_the_model_carries(invoke, tokenizer, tmp_path, monkeypatch):
    """A server takes it, so it is what is shown; options come before it."""
    rule = {"num_sink_tokens": 2, "window_size": 5, "keep": ["digits"]}
    (tmp_path / "config.json").write_text(json.dumps({"sepllm": rule}))
    text = tmp_path / "text"
    text.write_text(AWKWARD)

    def shown(model, *options):
        command = ["inspect", "--model", str(model), "--text", str(text), *options]
        return CliRunner().invoke(cli.app, command).stdout

    given = [part for key, value in rule.items() for part in ("-o", f"{key}={json.dumps(value)}")]
    source = f"\nWhat -o does not say is as config.json of {tmp_path} carries it.\n"
    assert shown(tmp_path) == shown(MODEL, *given) + source != shown(MODEL) + source
    wide = shown(tmp_path, "-o", "window_size=9")
    assert wide == shown(MODEL, *given[:2], "-o", "window_size=9", *given[4:]) + source
    text.write_text(AWKWARD, encoding="utf-8-sig")
    assert shown(tmp_path) == shown(MODEL, *given) + source, "a byte-order mark is no text"
    hostile = {**rule, "keep": ["separators"], "separators": ["\u009b31m", "\u202eabc", "."]}
    (tmp_path / "config.json").write_text(json.dumps({"sepllm": hostile}))
    assert not {"\u009b", "\u202e"} & {*shown(tmp_path)}
    after = {**rule, "keep_after": {"digits": 1}}
    (tmp_path / "config.json").write_text(json.dumps({"sepllm": after}))
    assert "kept" in shown(tmp_path, "-o", 'keep_after={"digits":2}'), "needs the rule's keep"


def test_a_file_of_nothing_but_a_mark_is_empty(tmp_path):
    (tmp_path / "text").write_text("", encoding="utf-8-sig")
    with pytest.raises(common.InputError, match="is empty"):
        common.read_text(str(tmp_path / "text"))


def test_a_command_to_copy_is_quoted_for_a_shell():
    better = types.SimpleNamespace(separators=("'", "default"), match="exact", share=0.1)
    config = types.SimpleNamespace(separator_token_ids=None)
    line = inspection_words._remedy(types.SimpleNamespace(better=better, config=config))
    assert shlex.split(line)[:2] == ["-o", 'separators=["\'", "default"]']


@pytest.mark.parametrize("model", ["", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_looked_up_elsewhere(model):
    result = CliRunner().invoke(cli.app, ["inspect", "--model", model])
    assert_refused(result, f"model {model!r} is no folder", "tokenizer.json")


def test_a_name_that_is_too_long():
    result = CliRunner().invoke(cli.app, ["inspect", "--model", "/" + 300 * "x"])
    assert_refused(result, "cannot be read (File name too long)", "tokenizer.json")


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = CliRunner().invoke(cli.app, ["inspect", "--model", str(MODEL)])
    assert_refused(result, "transformers cannot be imported", "pip install 'vllm-sepllm[eval]'")


@pytest.mark.parametrize("content", [None, "", "{}", "no json"])
def test_a_folder_without_a_usable_tokenizer(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    result = CliRunner().invoke(cli.app, ["inspect", "--model", str(tmp_path)])
    assert_refused(result, repr(str(tmp_path)), "has no tokenizer to load", "Hub")


def test_a_name_the_hub_does_not_know(monkeypatch):
    transformers = pytest.importorskip("transformers", reason="needs transformers")

    def refuse(model, **kwargs):
        assert kwargs == {"trust_remote_code": False}
        raise OSError(f"{model} is not a model.\nIf this is a private repository, log in.")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    result = CliRunner().invoke(cli.app, ["inspect", "--model", "some/name"])
    assert_refused(result, "model 'some/name'", "(some/name is not a model)")


def test_inspect_loads_the_models_own_tokenizer():
    pytest.importorskip("transformers", reason="needs transformers")
    result = CliRunner().invoke(cli.app, ["inspect", "--model", str(MODEL)])
    assert result.exit_code == 0
    assert "<s>Call me Ishmael." in result.output


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("window_size=64", 64),
        ('separators=[".", "="]', [".", "="]),
        ("max_separator_tokens=null", None),
        ("separator_match=composed", "composed"),
        ('policy="sepllm"', "sepllm"),
        ("separators=", ""),
        ("x=" + "[" * 100_000, "[" * 100_000),
    ],
)
def test_parse_options(pair, value):
    assert cli.parse_options([pair]) == {pair.partition("=")[0]: value}


@pytest.fixture
def diagnose(monkeypatch):
    """A stand-in for the engine's part; returns the arguments it was called with."""
    calls = []

    def install(rows=(), problems=(), error=None):
        module = types.ModuleType("vllm_sepllm.engine.doctor")

        def diagnose(model, options, dtype):
            calls.append((model, options, dtype))
            if error is not None:
                raise error
            return types.SimpleNamespace(rows=list(rows), problems=list(problems))

        module.diagnose = diagnose
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return calls

    return install


def test_doctor_passes_everything_on_and_is_content(diagnose):
    calls = diagnose(rows=[("Python", "3.11 [main]", True), ("vllm", "0.99", False)])
    arguments = ["doctor", "--model", "m", "-o", "window_size=8", "--dtype", "float32"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert calls == [("m", {"window_size": 8}, "float32")]
    assert re.search(r"Python\s*[│|]\s*3\.11 \[main\]\s*[│|]\s*ok", result.output)
    assert re.search(r"vllm\s*[│|]\s*0\.99\s*[│|]\s*no", result.output)
    assert "nothing found that would keep" in result.output


def test_doctor_lists_problems(diagnose):
    calls = diagnose(rows=[("vllm", "0.32.0", True)], problems=["block_size=[7]: no", "other"])
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert calls == [(None, {}, "auto")]
    assert "problem: block_size=[7]: no\nproblem: other\n" in result.output
    assert "nothing found" not in result.output


def test_doctor_draws_control_characters(diagnose):
    diagnose(rows=[("model", "a\x1b[31mb", False)], problems=["c\x1b]0;d\x07"])
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert "a␛[31mb" in result.output
    assert "problem: c␛]0;d␇\n" in result.output
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (ModuleNotFoundError("No module named 'vllm'"), "No module named 'vllm'"),
        (ConfigError("window_size=0: must be at least 1"), "window_size=0"),
    ],
)
def test_doctor_without_vllm_or_with_bad_options(diagnose, error, part):
    diagnose(error=error)
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("vllm-sepllm: ")
    assert part in result.stderr
    assert result.stderr.count("\n") == 1


def test_doctor_refuses_a_malformed_option(diagnose):
    calls = diagnose()
    assert_refused(CliRunner().invoke(cli.app, ["doctor", "-o", "window_size"]), "KEY=VALUE")
    assert calls == []


def test_importing_the_command_imports_nothing_heavy():
    code = (
        "import sys, vllm_sepllm, vllm_sepllm.cli.main; "
        "print(sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
