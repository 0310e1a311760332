"""``vllm-sepllm inspect --html``: one page without outside references."""

from __future__ import annotations

from html import escape

from vllm_sepllm.inspection import LEGEND, Inspection, Token, summary_rows, visible_text

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --ink: #1c1c1a; --faint: #6f6f69;
  --line: #dddcd6; --sink: #a9d0f5; --separator: #ffc46b; --window: #b5e5c8; }
@media (prefers-color-scheme: dark) { :root { --page: #191a1c; --ink: #ececea; --faint: #96968f;
  --line: #3a3b3e; --sink: #1d5b92; --separator: #965e00; --window: #1e6442; } }
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
.token { border-radius: .2rem; padding: .15rem 0; box-decoration-break: clone; }
.token:hover { outline: 2px solid var(--ink); }
.token:empty::before { content: "\\00b7"; }
.gap { display: block; margin: .5rem 0; font-style: italic; }
.sink { background: var(--sink); }
.separator { background: var(--separator); }
.window { background: var(--window); }
.dropped { color: var(--faint); }
table { border-collapse: collapse; margin-top: 1.5rem; }
th, td { text-align: left; font-weight: normal; padding: .3rem 1.5rem .3rem 0;
  border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; }
"""


def html_page(title: str, about: str, inspection: Inspection) -> str:
    """A page of tokens coloured by class, a legend and a table.

    Args:
        title: heading, plain text.
        about: one line under it, plain text.
        inspection: tokens and counts.
    """
    legend = "\n".join(
        f'<li><span class="{kind}">{kind}</span>{escape(words)}</li>'
        for kind, words in LEGEND.items()
    )
    hidden = inspection.num_hidden
    gap = f'<span class="gap">{hidden:,} tokens not shown</span>' if hidden else ""
    tokens = "".join(map(_token, inspection.head)) + gap + "".join(map(_token, inspection.tail))
    table = "\n".join(
        f"<tr><th>{escape(what)}</th><td>{escape(value)}</td></tr>"
        for what, value in summary_rows(inspection.summary)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="about">{escape(about)}</p>
<ul class="legend">
{legend}
</ul>
<div class="text">{tokens}</div>
<table>
{table}
</table>
</body>
</html>
"""


def _token(token: Token) -> str:
    hover = f"position {token.position}, token id {token.token_id}, {token.kind}"
    text = escape(visible_text(token.text)).replace("\n", "<br>")
    return f'<span class="token {token.kind}" title="{hover}">{text}</span>'
