"""``vllm-sepllm inspect --html``: one page without outside references."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from vllm_sepllm.cli.inspection import Excerpt, Inspection, Token, TokenClass, visible_text
from vllm_sepllm.cli.inspection_words import (
    describe,
    labels,
    legend,
    notices,
    summary_rows,
)

_PART = 500  # tokens, about; a browser draws the parts of a long text when they come into view

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --ink: #1c1c1a; --faint: #6f6f69;
  --line: #dddcd6; --sink: #a9d0f5; --chosen: #ffc46b; --window: #b5e5c8;
  --class0: #dcc6f3; --class1: #f7b9b6; --class2: #ece29a; --class3: #d3d8de; }
@media (prefers-color-scheme: dark) { :root { --page: #191a1c; --ink: #ececea; --faint: #96968f;
  --line: #3a3b3e; --sink: #1d5b92; --chosen: #965e00; --window: #1e6442;
  --class0: #5f3f82; --class1: #8a3a37; --class2: #6d6413; --class3: #4a525b; } }
body { margin: 2.5rem auto; max-width: 60rem; padding: 0 1.25rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; margin: 0 0 .25rem; }
.about, .gap { color: var(--faint); }
.about { margin: 0 0 1.25rem; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.25rem; margin: 0 0 1.25rem; padding: 0;
  list-style: none; font-size: .9rem; }
.legend span { padding: .1rem .5rem; margin-right: .4rem; }
.text { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem 1.25rem;
  font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.part { content-visibility: auto; contain-intrinsic-size: auto 40rem; }
.notice { border-left: .25rem solid var(--chosen); margin: 0 0 1.25rem; padding-left: .75rem; }
.token { border-radius: .2rem; padding: .15rem 0; box-decoration-break: clone; }
.token:hover { outline: 2px solid var(--ink); }
.token:empty::before { content: "\\00b7"; }
.gap { display: block; margin: .5rem 0; font-style: italic; }
.sink { background: var(--sink); }
.chosen { background: var(--chosen); }
.class0 { background: var(--class0); }
.class1 { background: var(--class1); }
.class2 { background: var(--class2); }
.class3 { background: var(--class3); }
.window { background: var(--window); }
.dropped { color: var(--faint); }
table { border-collapse: collapse; margin-top: 1.5rem; }
th, td { text-align: left; font-weight: normal; padding: .3rem 1.5rem .3rem 0;
  border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; }
"""


def html_page(model: str, inspection: Inspection, shown: Excerpt) -> str:
    """A page of tokens coloured by class, a legend and a table.

    Args:
        model: its name, for the heading.
        inspection: options and counts.
        shown: the tokens.
    """
    config = inspection.config
    names = labels(config)
    css = _css_classes(names)
    title = escape(visible_text(f"{config.method.title} on {model}"))
    meanings = "\n".join(
        f'<li><span class="{css[kind]}">{escape(names[kind])}</span>{escape(words)}</li>'
        for kind, words in legend(config).items()
    )
    hidden = shown.num_hidden
    gap = f'<span class="gap">{hidden:,} tokens not shown</span>' if hidden else ""
    tokens = _parts(shown.head, names, css) + gap + _parts(shown.tail, names, css)
    table = "\n".join(
        f"<tr><th>{escape(what)}</th><td>{escape(value)}</td></tr>"
        for what, value in summary_rows(inspection)
    )
    warnings = "\n".join(f'<p class="notice">{escape(each)}</p>' for each in notices(inspection))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="about">{escape(describe(inspection))}</p>
{warnings}
<ul class="legend">
{meanings}
</ul>
<div class="text" dir="auto">{tokens}</div>
<table>
{table}
</table>
</body>
</html>
"""


def _css_classes(kinds: Iterable[str]) -> dict[str, str]:
    """CSS class of each kind of token; those of ``keep`` beside separators take four in turn."""
    found = {kind: kind for kind in kinds if kind in set(TokenClass)}
    others = [kind for kind in kinds if kind not in found]
    return {**found, **{kind: f"class{i % 4}" for i, kind in enumerate(others)}}


def _parts(tokens: list[Token], names: dict[str, str], css: dict[str, str]) -> str:
    """The tokens in parts that end with a line, so that cutting them changes no line."""
    parts: list[list[str]] = [[]]
    for token in tokens:
        parts[-1].append(_token(token, names[token.kind], css[token.kind]))
        if len(parts[-1]) >= _PART and token.text.endswith("\n"):
            parts.append([])
    return "".join(f'<div class="part">{"".join(part)}</div>' for part in parts if part)


def _token(token: Token, name: str, css: str) -> str:
    hover = f"position {token.position}, token id {token.token_id}, {escape(name)}"
    text = escape(visible_text(token.text)).replace("\n", "<br>")
    return f'<span class="token {css}" title="{hover}">{text}</span>'
