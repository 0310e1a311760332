"""SepLLM beside full attention on a book, with the same KV memory; then a question to SmolLM2.

    python examples/demo.py                                # everything, as `make demo` does
    python examples/demo.py --run dense --json dense.json  # one engine of the first part

Each engine runs in a process of its own. The KV cache is kept so small that requests have to
wait for it, as they do on a busy server; what is printed was read from vLLM's scheduler while
it ran.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from demo_answers import MODEL as ANSWERS_MODEL

HERE = Path(__file__).resolve().parent
MODEL = "examples/models/pg19-5m-sep"
BOOK = HERE / "data" / "860.txt"
NAMES = {"dense": "full attention", "sepllm": "SepLLM"}

WINDOW = 64  # the model was post-trained with this window and four sinks
NUM_REQUESTS = 32
PROMPT_TOKENS = 1_700
NEW_TOKENS = 128
SAMPLE_PROMPT_TOKENS = 500  # for the text shown; the model was trained on 1,024 tokens at a time
BLOCK_SIZE = 32
KV_BYTES = 30 * 2**20
PAGE = HERE.parent / "build" / "demo.html"
PAGE_CHARACTERS = 12_000

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler is read below
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Spinning threads are several times slower when something else wants one of the cores.
    "OMP_WAIT_POLICY": "passive",
}


def book(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.encode(BOOK.read_text(encoding="utf-8"), add_special_tokens=False)
    return ids


def prompts(ids: list[int]) -> list[list[int]]:
    """Slices of the book that start at evenly spread places."""
    stride = (len(ids) - PROMPT_TOKENS) // NUM_REQUESTS
    return [ids[i * stride :][:PROMPT_TOKENS] for i in range(NUM_REQUESTS)]


def make_engine(name: str) -> Any:
    from vllm import LLM

    return LLM(
        str(HERE.parent / MODEL),
        attention_backend="sepllm" if name == "sepllm" else None,
        additional_config={"sepllm": {"window_size": WINDOW}} if name == "sepllm" else {},
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=KV_BYTES,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        enforce_eager=True,
        disable_log_stats=True,
    )


def num_decoding(scheduler: Any) -> int:
    """Running requests whose whole prompt is in the KV cache."""
    return sum(r.num_computed_tokens >= r.num_prompt_tokens for r in scheduler.running)


def run(name: str) -> dict[str, Any]:
    """Generate for all prompts with one engine and watch its scheduler after every step."""
    from vllm import SamplingParams

    from vllm_sepllm.engine.in_process import pages_held

    llm = make_engine(name)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    ids = book(llm.get_tokenizer())
    sample = {"prompt_token_ids": ids[:SAMPLE_PROMPT_TOKENS]}
    sample_text = llm.generate(sample, params, use_tqdm=False)[0].outputs[0].text  # warms up, too

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    for i, prompt in enumerate(prompts(ids)):
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
    last_held: dict[str, int] = {}
    outputs: dict[int, Any] = {}
    at_once = 0
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs |= {int(o.request_id): o.outputs[0] for o in engine.step() if o.finished}
        last_held |= pages_held(llm)
        at_once = max(at_once, num_decoding(scheduler))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens_per_second": NUM_REQUESTS * NEW_TOKENS / seconds,
        "kv_blocks": scheduler.kv_cache_config.num_blocks,
        "blocks_at_end": sum(last_held.values()) / len(last_held),
        "requests_at_once": at_once,
        "outputs": [list(outputs[i].token_ids) for i in range(NUM_REQUESTS)],
        "sample_text": sample_text,
    }


def share_visible(name: str, outputs: list[list[int]]) -> float:
    """Share of its context that the last query of a request attends to, on average."""
    if name == "dense":
        return 1.0
    from transformers import AutoTokenizer

    from vllm_sepllm.config import SepLLMConfig
    from vllm_sepllm.evaluation.share import num_attended

    tokenizer = AutoTokenizer.from_pretrained(HERE.parent / MODEL)
    config = SepLLMConfig(window_size=WINDOW)
    asked = zip(prompts(book(tokenizer)), outputs, strict=True)
    texts = [prompt + output for prompt, output in asked]
    shares = [num_attended(config, tokenizer, text) / len(text) for text in texts]
    return sum(shares) / len(shares)


def run_in_subprocess(name: str) -> dict[str, Any]:
    """A vLLM engine gives its memory back only when its process ends."""
    print(f"running {NAMES[name]} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder, "result.json"), Path(folder, "log")
        command = [sys.executable, __file__, "--run", name, "--json", str(path)]
        with log.open("w") as stream:
            code = subprocess.call(command, stdout=stream, stderr=stream)
        if code:
            sys.exit(f"{log.read_text()}\n{' '.join(command)}: exit status {code}")
        result: dict[str, Any] = json.loads(path.read_text())
    return result


def show_answers() -> None:
    """The second part, without what vLLM says on the way."""
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, str(HERE / "demo_answers.py")]
        code = subprocess.call(command, stderr=log)
        if code:
            log.seek(0)
            sys.exit(f"{log.read()}\n{' '.join(command)}: exit status {code}")


def show(results: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(
        box=box.SIMPLE_HEAVY,
        title=f"{NUM_REQUESTS} requests of {PROMPT_TOKENS} book tokens + {NEW_TOKENS} new ones, "
        f"{KV_BYTES >> 20} MiB of KV memory",
    )
    table.add_column()
    for name in results:
        table.add_column(NAMES[name], justify="right")
    rows = {
        "tokens generated per second": lambda r: f"{r['tokens_per_second']:.0f}",
        "requests that fit at once": lambda r: f"{r['requests_at_once']}",
        f"KV blocks ({BLOCK_SIZE} tokens) held at a request's end": lambda r: (
            f"{r['blocks_at_end']:.1f}"
        ),
        "share of full attention's blocks": lambda r: (
            f"{r['blocks_at_end'] / results['dense']['blocks_at_end']:.0%}"
        ),
        "share of tokens kept (sinks, separators, window)": lambda r: f"{r['share_visible']:.0%}",
        "KV blocks in all": lambda r: f"{r['kv_blocks']}",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(r) for r in results.values()))
    console.print(table)
    for name, result in results.items():
        text = " ".join(result["sample_text"].split())[:160]
        console.print(f"[bold]{NAMES[name]}[/] continues the book: [dim]{escape(text)} ...[/]")


def write_page(path: Path) -> None:
    """The book's beginning, with a slider: what each token sees, and what has been freed."""
    from transformers import AutoTokenizer

    from vllm_sepllm.cli.inspection import inspect_text
    from vllm_sepllm.cli.inspection_html import html_page
    from vllm_sepllm.cli.inspection_memory import read_shape
    from vllm_sepllm.config import SepLLMConfig

    folder = str(HERE.parent / MODEL)
    text = BOOK.read_text(encoding="utf-8")[:PAGE_CHARACTERS]
    config = SepLLMConfig(window_size=WINDOW)
    inspection = inspect_text(AutoTokenizer.from_pretrained(folder), config, text, BLOCK_SIZE)
    page = html_page(MODEL, inspection, 0, read_shape(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(f"What is kept of the book, to open in a browser: {path}\n")


def show_next_step() -> None:
    options = json.dumps({"sepllm": {"window_size": WINDOW}})
    print(f"""
Serve it (OpenAI API on port 8000):

  .venv/bin/vllm serve {MODEL} --attention-backend sepllm \\
    --additional-config '{options}' \\
    --max-model-len 2048 --kv-cache-memory-bytes {KV_BYTES}

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{MODEL}", "prompt": "It was a dark night, and", "max_tokens": 40}}'
""")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", choices=NAMES, help="run this engine only")
    parser.add_argument("--json", type=Path, help="with --run: where the result is written")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page that is written")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT | os.environ)  # what the user has set stays
    if args.run:
        result = run(args.run)
        text = json.dumps(result)
        args.json.write_text(text) if args.json else print(text)
        return
    results = {name: run_in_subprocess(name) for name in ("sepllm", "dense")}
    for name, result in results.items():
        result["share_visible"] = share_visible(name, result["outputs"])
    show(results)
    write_page(args.output)
    if (HERE.parent / ANSWERS_MODEL).is_dir():
        show_answers()
    else:
        show_next_step()


if __name__ == "__main__":
    main()
