"""``vllm-sepllm inspect --html``: one page with a slider for the position, without outside
references.

The page has the beginning of a text, not both ends as a terminal has: its slider goes through it
from the first token, and what is seen and held at a position depends on the tokens up to it alone.
``page/`` holds the parts. ``rule.js`` there says what is seen and held, as ``policy.py`` does here.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable
from hashlib import sha256
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from vllm_sepllm.cli.inspection import Inspection, TokenClass, visible_text
from vllm_sepllm.cli.inspection_memory import KVShape, kv_bytes
from vllm_sepllm.cli.inspection_words import describe, labels, legend, notices
from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.layers import LayerPlan

# Tokens of a part, a browser draws the parts of a long text when they come into view: at least so
# many, up to the end of a line, and at most.
_PART, _LONGEST_PART = 500, 1000
_SCRIPTS = "rule.js", "words.js", "strip.js", "page.js"


def html_page(model: str, inspection: Inspection, limit: int, shape: KVShape | None = None) -> str:
    """The page, of the first ``limit`` tokens.

    Args:
        model: its name, for the heading.
        inspection: options, tokens, and why each is kept.
        limit: tokens; 0 is all.
        shape: of the model's KV cache, for bytes; without it the page counts pages alone.
    """
    config = inspection.config
    total = len(inspection.token_ids)
    shown = min(limit or total, total)
    css = _css_classes(labels(config))
    style, script = _part("page.css"), "\n".join(_part(name) for name in _SCRIPTS)
    title = escape(visible_text(f"{config.method.title} on {model}"))
    said = [*notices(inspection), *_left_out(shown, total)]
    return Template(_part("page.html")).substitute(
        title=title,
        about=escape(visible_text(describe(inspection))),
        notices="\n".join(f'<p class="notice">{escape(visible_text(each))}</p>' for each in said),
        text=_text(inspection.texts[:shown]),
        data=_json(_data(inspection, css, shown, shape)),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _part(name: str) -> str:
    return files("vllm_sepllm.cli").joinpath("page", name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    """What a content security policy calls an inline script or style that may run."""
    return b64encode(sha256(source.encode()).digest()).decode()


def _left_out(shown: int, total: int) -> list[str]:
    if shown == total:
        return []
    return [
        f"this page has the first {shown:,} of {total:,} tokens; what it says of them is exact, as "
        "nothing depends on later tokens: --limit 0 makes a page of all"
    ]


def _css_classes(kinds: Iterable[str]) -> dict[str, str]:
    """CSS class of each kind of token; those of ``keep`` beside separators take five in turn."""
    found = {kind: kind for kind in kinds if kind in set(TokenClass)}
    others = [kind for kind in kinds if kind not in found]
    return {**found, **{kind: f"class{i % 5}" for i, kind in enumerate(others)}}


def _text(texts: Iterable[str]) -> str:
    """The tokens in parts that end with a line, so that cutting them changes no line.

    A line that is longer than a part is broken there, as it is at the edge of the page.
    """
    parts: list[list[str]] = [[]]
    for text in texts:
        parts[-1].append(f"<span>{escape(visible_text(text))}</span>")
        if len(parts[-1]) >= (_PART if text.endswith("\n") else _LONGEST_PART):
            parts.append([])
    return "".join(f'<div class="part">{"".join(part)}</div>' for part in parts if part)


def _data(
    inspection: Inspection, css: dict[str, str], shown: int, shape: KVShape | None
) -> dict[str, Any]:
    """What the page's script is given; ``kept`` has an index into ``kinds`` or -1 of each token."""
    config, names, meanings = (
        inspection.config,
        labels(inspection.config),
        legend(inspection.config),
    )
    kinds = [kind for kind in names if kind not in (TokenClass.WINDOW, TokenClass.DROPPED)]
    index = {kind: i for i, kind in enumerate(kinds)} | {TokenClass.DROPPED: -1}
    return {
        "title": config.method.title,
        "isStreaming": config.policy == "streaming",
        "sinks": config.num_sink_tokens,
        "window": config.window_size,
        "bound": config.max_separator_tokens,
        "blockSize": inspection.summary.block_size,
        "cachePositions": config.position_mode == "cache",
        "ids": inspection.token_ids[:shown],
        "kept": [index[kind] for kind in inspection.reasons[:shown]],
        "kinds": [
            {"css": css[kind], "label": names[kind], "meaning": meanings[kind]} for kind in kinds
        ],
        "bytesPerPage": _bytes_per_page(config, inspection.summary.block_size, shape),
    }


def _bytes_per_page(
    config: SepLLMConfig, block_size: int, shape: KVShape | None
) -> dict[str, int] | None:
    """Of a page in all layers that SepLLM changes, and in those that it leaves dense."""
    if shape is None:
        return None
    num_dense = len(LayerPlan.of(config.dense_layers, shape.num_layers).dense)
    return {
        "kept": kv_bytes(shape, block_size, shape.num_layers - num_dense),
        "dense": kv_bytes(shape, block_size, num_dense),
    }


def _json(data: dict[str, Any]) -> str:
    """JSON that ends no script element, whatever texts it holds."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
