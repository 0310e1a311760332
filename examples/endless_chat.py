# .venv/bin/python examples/endless_chat.py    (after examples/serve_endless.sh)
"""One conversation that goes on past the length its model was made for.

Every turn sends all of it, as chats do. The server finds what it has read in its prefix cache and
computes the rest; a query attends to as many tokens as ever, and the memory held stays the same.
"""

import argparse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

BOOK = Path(__file__).parent / "data/860.txt"
SEEN = 4 + 64 + 256  # most tokens a query attends to, with the options of serve_endless.sh


def paragraphs(words: int) -> Iterator[str]:
    """What the reader says: the book, a few paragraphs at a time."""
    text: list[str] = []
    for paragraph in BOOK.read_text(encoding="utf8").split("\n\n"):
        text += paragraph.split()
        if len(text) >= words:
            yield " ".join(text)
            text = []


def blocks_held(metrics_url: str) -> int:
    """Blocks that running requests hold, from the server's metrics."""
    found = {}
    for line in urllib.request.urlopen(metrics_url).read().decode().splitlines():
        if line.startswith("vllm:kv_cache_usage_perc{"):
            found["usage"] = float(line.rsplit(" ", 1)[1])
        if line.startswith("vllm:cache_config_info{"):
            found["blocks"] = float(line.split('num_gpu_blocks="')[1].split('"')[0])
    return round(found["usage"] * (found["blocks"] - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--words", type=int, default=150, help="of the reader, per turn")
    parser.add_argument("--max-tokens", type=int, default=60, help="of an answer")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key="none")
    model = client.models.list().data[0].id
    messages = []
    print("turn  tokens so far  computed now  attended at the end  most blocks  answer")
    for turn, text in zip(range(1, args.turns + 1), paragraphs(args.words), strict=False):
        messages.append({"role": "user", "content": text})
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            max_tokens=args.max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        answer, held = "", 0
        for chunk in stream:
            if chunk.choices:
                answer += chunk.choices[0].delta.content or ""
                held = max(held, blocks_held(args.base_url.removesuffix("/v1") + "/metrics"))
            else:
                usage = chunk.usage
        messages.append({"role": "assistant", "content": answer})
        cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        total = usage.total_tokens
        row = f"{turn:4}  {total:13,}  {total - cached:12,}  {min(1, SEEN / total):19.1%}"
        print(f"{row}  {held:11}  {' '.join(answer.split())[:60]}", flush=True)


if __name__ == "__main__":
    main()
