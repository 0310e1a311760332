"""Draw docs/sepllm.svg: what a query sees, and which pages of the KV cache are freed.

    .venv/bin/python scripts/draw_picture.py

The classes of the tokens and the pages come from the rule itself (`vllm_sepllm/policy.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from vllm_sepllm.policy import KeepRule

PICTURE = Path(__file__).resolve().parent.parent / "docs/sepllm.svg"
TEXT = (
    "It was cold that day . Anna took her coat , two apples and a map ; then she left the old house"
)
SINKS, WINDOW, PAGE = 2, 5, 4
MARKS = {".", ",", ";"}

# Sizes in SVG units. A letter of the font is about 7.3 wide.
LETTER, PAD, GAP, HEIGHT, LEFT, RIGHT = 7.3, 6, 3, 26, 14, 14
STYLE = """
  text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328 }
  .label { font: 13px system-ui, sans-serif; fill: #57606a }
  .sink { fill: #d8b9ff } .separator { fill: #ffd08a } .window { fill: #a8d4ff }
  .dropped { fill: none; stroke: #afb8c1; stroke-dasharray: 3 3 }
  text.dropped { fill: #8c959f; stroke: none }
  .page { fill: none; stroke: #57606a; stroke-width: 1.5 }
  .freed { stroke-dasharray: 4 4; stroke: #afb8c1 }
  .query { fill: none; stroke: #0969da; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .label { fill: #9198a1 } text.dropped { fill: #6e7681 }
    .sink { fill: #6e40c9 } .separator { fill: #9e6a03 } .window { fill: #1f6feb }
    .page { stroke: #9198a1 } .freed, .dropped { stroke: #484f58 } .query { stroke: #58a6ff }
  }"""


class Row:
    """Tokens side by side as boxes, some way down the picture."""

    def __init__(self, top: float) -> None:
        self.top, self.right = top, float(LEFT)
        self.parts: list[str] = []

    def token(self, text: str, kind: str) -> tuple[float, float]:
        """Add a box; its left and right edge."""
        left, width = self.right, len(text) * LETTER + 2 * PAD
        self.parts.append(
            f'<rect class="{kind}" x="{left:.1f}" y="{self.top}" width="{width:.1f}" '
            f'height="{HEIGHT}" rx="4"/>'
            f'<text class="{kind if kind == "dropped" else ""}" x="{left + width / 2:.1f}" '
            f'y="{self.top + 17}" text-anchor="middle">{escape(text)}</text>'
        )
        self.right = left + width + GAP
        return left, left + width

    def frame(self, left: float, right: float, css: str) -> None:
        """Draw a border around boxes."""
        self.parts.append(
            f'<rect class="{css}" x="{left - 3:.1f}" y="{self.top - 4}" '
            f'width="{right - left + 6:.1f}" height="{HEIGHT + 8}" rx="6"/>'
        )

    def pages(self, tokens: Sequence[tuple[str, str]], freed: Sequence[bool]) -> None:
        """Tokens in frames of ``PAGE``."""
        for page, is_freed in enumerate(freed):
            edges = [self.token(*each) for each in tokens[page * PAGE : (page + 1) * PAGE]]
            self.frame(edges[0][0], edges[-1][1], "page freed" if is_freed else "page")
            self.right += 10


def draw() -> str:
    """The picture as SVG."""
    words = TEXT.split()
    is_kept = np.array([word in MARKS for word in words])
    rule = KeepRule(SINKS, WINDOW, is_kept)
    last = len(words) - 1
    start = int(rule.window_start(last))
    kept = rule.kept_flags(np.arange(len(words)))

    def kind(position: int) -> str:
        if position >= start:
            return "window"
        if position < SINKS:
            return "sink"
        return "separator" if kept[position] else "dropped"

    tokens = [(word, kind(position)) for position, word in enumerate(words)]
    seen = Row(40)
    edges = [seen.token(*token) for token in tokens]
    seen.frame(*edges[last], "query")
    window = Row(118)
    num_pages = -(-len(words) // PAGE)
    as_window = [(word, "window" if i >= start else "dropped") for i, word in enumerate(words)]
    window.pages(as_window, [(page + 1) * PAGE <= start for page in range(num_pages)])
    stream = Row(196)
    entries = [
        (words[i], "sink" if i < SINKS else "separator") for i in np.flatnonzero(kept).tolist()
    ]
    stream.pages(entries, [False] * -(-len(entries) // PAGE))
    width = max(row.right for row in (seen, window, stream)) + RIGHT
    num_seen = sum(name != "dropped" for _, name in tokens)
    labels = (
        (26, f"“{words[last]}” sees {num_seen} of {len(words)} tokens: sinks, separators, window."),
        (104, "Pages of the window: those behind it go back to the pool."),
        (182, "Pages of the kept stream: sinks and separators, packed."),
    )
    lines = [f'<text class="label" x="{LEFT}" y="{y}">{escape(text)}</text>' for y, text in labels]
    for row in (seen, window, stream):
        lines += row.parts
    body = "\n".join(lines)
    title = "What a query sees under SepLLM attention, and which pages of the KV cache are freed"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} 236" role="img">\n'
        f"<title>{title}</title>\n<style>{STYLE}\n</style>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
