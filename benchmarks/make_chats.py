"""Chats about books, answered by SmolLM2 with full attention: text for :mod:`post_training`.

    python benchmarks/make_chats.py

A chat is a passage of a book that is trained on, and four requests about it, one after the other.
The model's answers are drawn with a seed. Its answers on another processor may differ, so the chats
are kept in the repository (``benchmarks/data/chats.gz``).
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from record import ROOT
from retrieval import MODEL, read_book

from vllm_sepllm.engine.in_process import engine

BOOKS = ["benchmarks/data/5396.txt.gz", "benchmarks/data/22424.txt.gz"]
OUTPUT = ROOT / "benchmarks/data/chats.gz"
PASSAGE, ANSWER = 700, 240  # tokens; the latter at most
REQUESTS = (
    "Summarise this passage in three sentences.",
    "Who appears here, and what does each of them want?",
    "Which sentence of it matters most, and why?",
    "Tell the same as a letter to a friend.",
    "What could happen next? Write the next paragraph.",
    "List what is said about the place and the time.",
    "Explain two words of it that a child would not know.",
    "How do the people feel, and how can one tell?",
    "Write a title for it, and say why it fits.",
    "Ask three questions that the passage answers, and answer them.",
    "Say it again in plain, modern English.",
    "What would you ask the author about it?",
    "Write a short dialogue between two readers of it.",
    "Is it a good beginning for a film? Give reasons.",
    "Make a numbered list of what happens.",
    "Write a poem of eight lines about it.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chats", type=int, default=64)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    from vllm import SamplingParams

    random = np.random.default_rng(0)
    # With a seed for each request vLLM 0.32 ends where a prompt is cut in pieces on a CPU.
    drawn = SamplingParams(temperature=0.7, top_p=0.95, max_tokens=ANSWER)
    with engine(
        str(MODEL),
        None,
        dtype="bfloat16",
        seed=0,
        max_model_len=4096,
        kv_cache_memory_bytes=4 << 30,
        max_num_batched_tokens=2048,
    ) as llm:
        tokenizer = llm.get_tokenizer()
        books = [tokenizer.encode(read_book(ROOT / book)) for book in BOOKS]
        chats: list[list[dict[str, str]]] = []
        asked = []
        for number in range(given.chats):
            book = books[number % len(books)]
            at = int(random.integers(len(book) - PASSAGE))
            chats.append([])
            asked.append(random.permutation(len(REQUESTS))[:4].tolist())
            passage = tokenizer.decode(book[at : at + PASSAGE]).strip()
            chats[-1].append({"role": "user", "content": passage})
        for turn in range(4):
            for chat, requests in zip(chats, asked, strict=True):
                request = REQUESTS[requests[turn]]
                if turn:
                    chat.append({"role": "user", "content": request})
                else:
                    chat[0]["content"] += f"\n\n{request}"
            prompts = [
                {
                    "prompt_token_ids": tokenizer.apply_chat_template(
                        chat, add_generation_prompt=True, return_dict=False
                    )
                }
                for chat in chats
            ]
            for chat, answer in zip(chats, llm.generate(prompts, drawn), strict=True):
                chat.append({"role": "assistant", "content": answer.outputs[0].text.strip()})
        text = "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)
    with gzip.GzipFile(given.output, "wb", mtime=0) as file:
        file.write(text.encode("utf8"))
    print(f"{given.chats} chats, {len(tokenizer.encode(text)):,} tokens: {given.output}")


if __name__ == "__main__":
    main()
