"""What a page of ``inspect --html`` holds, read without a browser."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Page:
    """The tokens' texts, and the data that the page's script is given."""

    source: str
    texts: list[str]
    data: dict[str, Any]

    @property
    def legend(self) -> dict[str, str]:
        """What each kind of kept token means, by its name."""
        return {kind["label"]: kind["meaning"] for kind in self.data["kinds"]}

    def kinds(self) -> list[tuple[str, str]]:
        """CSS class and name of each token as the last one sees it."""
        kept, size = self.data["kept"], self.data["window"]
        start = max(0, len(kept) - size)
        entries = [k for k in range(start) if kept[k] >= 0]
        if self.data["bound"] is not None:
            sinks = self.data["sinks"]
            entries = entries[:sinks] + entries[sinks:][-self.data["bound"] :]
        found = [("dropped", "dropped")] * start + [("window", "window")] * (len(kept) - start)
        for k in entries:
            kind = self.data["kinds"][kept[k]]
            found[k] = kind["css"], kind["label"]
        return found


def read_page(source: str) -> Page:
    """Of the page's source."""
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source)
    [text] = re.findall(r'<div id="text"[^>]*>(.*)</div>\n</section>', source, re.S)
    texts = [html.unescape(each) for each in re.findall(r"<span>(.*?)</span>", text, re.S)]
    return Page(source, texts, json.loads(data))
