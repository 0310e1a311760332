"""How fast the page of ``inspect --html`` opens and moves in headless Chromium.

    .venv/bin/python benchmarks/inspect_page.py [--tokens 20000] [--picture docs/inspect.png]

Prints JSON. ``opens_s``: from the request to a drawn page whose slider works, in a fresh browser
each. ``step_ms``: one position further, layout included, somewhere in the middle of the text.
``jump_ms``: from the first position to the last. With ``--picture`` the page of the demo is drawn
to a file instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import ROOT, provenance
from transformers import AutoTokenizer

from vllm_sepllm.cli.inspection import inspect_text
from vllm_sepllm.cli.inspection_html import html_page
from vllm_sepllm.cli.inspection_memory import read_shape
from vllm_sepllm.config import SepLLMConfig

sys.path.insert(0, str(ROOT / "tests/support"))
from browser import start_chromium

MODEL = "examples/models/pg19-5m-sep"
WINDOW, BLOCK_SIZE, BROWSERS = 64, 32, 5
DRAWN_CHARACTERS = 12_000  # of the picture, as in examples/demo.py
DRAWN = """
const done = arguments[0];
requestAnimationFrame(() => setTimeout(() => done(tokens.length), 0));
"""
MOVES = """
const timed = (positions) => {
  const start = performance.now();
  for (const p of positions) { goTo(p); document.body.getBoundingClientRect(); }
  return (performance.now() - start) / positions.length;
};
const middle = Math.floor(last / 2);
const steps = timed(Array.from({ length: 200 }, (_, i) => middle + i));
goTo(0);
return [steps, timed([last, 0, last, 0])];
"""


def write_page(path: Path, num_tokens: int, num_characters: int) -> None:
    """The book's beginning, cut off behind so many characters, then tokens; 0 tokens is all."""
    text = (ROOT / "examples/data/860.txt").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    config = SepLLMConfig(window_size=WINDOW)
    inspection = inspect_text(tokenizer, config, text[:num_characters], BLOCK_SIZE)
    shape = read_shape(str(ROOT / MODEL))
    path.write_text(html_page(MODEL, inspection, num_tokens, shape), encoding="utf-8")


def measure(page: Path) -> dict[str, Any]:
    opens, steps, jumps, count = [], [], [], 0
    for _ in range(BROWSERS):
        with tempfile.TemporaryDirectory() as profile:
            browser = start_chromium(Path(profile))
            start = time.perf_counter()
            browser.get(page.as_uri())
            count = browser.execute_async_script(DRAWN)
            opens.append(time.perf_counter() - start)
            step, jump = browser.execute_script(MOVES)
            browser.quit()
            steps.append(step)
            jumps.append(jump)
    return {
        "tokens": count,
        "bytes": page.stat().st_size,
        "opens_s": [round(x, 2) for x in opens],
        "step_ms": round(statistics.median(steps), 1),
        "jump_ms": round(statistics.median(jumps), 1),
    }


def draw(page: Path, picture: Path) -> None:
    with tempfile.TemporaryDirectory() as profile:
        browser = start_chromium(Path(profile))
        size = {"width": 1200, "height": 880, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.as_uri())
        browser.execute_script("goTo(Math.floor(last * 0.6))")
        browser.execute_async_script(DRAWN)
        browser.save_screenshot(str(picture))
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20_000, help="of the page")
    parser.add_argument("--picture", type=Path, help="draw the demo's page to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        if args.picture:
            write_page(page, 0, DRAWN_CHARACTERS)
            draw(page, args.picture)
            return
        write_page(page, args.tokens, 6 * args.tokens)
        found = {**provenance("selenium"), "cpus": os.cpu_count(), **measure(page)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
