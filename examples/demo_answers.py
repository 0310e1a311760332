"""SmolLM2 is asked for facts that stand far back in a text: the second part of `make demo`.

    python examples/demo_answers.py             # four ways to attend, and the table
    python examples/demo_answers.py --seed 7    # another text, and other facts

Every way gets the same thousand tokens of a book, with a number, a name and a word in it, and is
asked for each. Its answer is begun with the sentence that says so; how it goes on is shown. What it
holds was read from vLLM's scheduler when the last token of the answer was computed.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = "build/models/SmolLM2-135M-Instruct"
BOOK = HERE / "data" / "860.txt"
WINDOW = 256
DISTANCE = 800  # tokens of the book behind the facts
NEW_TOKENS = 7
CHAT = "What is the capital of France, and what is it known for?"
FULL, FACTS = "full attention", 'SepLLM, preset "facts"'
FACTS_OPTIONS = {"preset": "facts"}

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler is read
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_WAIT_POLICY": "passive",
}
ENGINE: dict[str, Any] = {
    "max_model_len": 2048,
    "block_size": 32,
    "max_num_seqs": 1,
    "kv_cache_memory_bytes": 256 * 2**20,
    "use_tqdm_on_load": False,
}


def ways(tokenizer: Any, prompt: list[int]) -> dict[str, dict[str, Any] | None]:
    """Names of what a query attends to, with SepLLM's options; ``None`` is vLLM's own attention."""
    from vllm_sepllm.config import SepLLMConfig
    from vllm_sepllm.evaluation.share import window_of_equal_share

    facts = SepLLMConfig.from_dict({"window_size": WINDOW, **FACTS_OPTIONS})
    equal = window_of_equal_share(facts, tokenizer, prompt)
    return {
        FULL: None,
        "SepLLM": {"window_size": WINDOW},
        FACTS: {"window_size": WINDOW, **FACTS_OPTIONS},
        "StreamingLLM, equal tokens": {"policy": "streaming", "window_size": equal.window_size},
    }


def ask_all(document: Any) -> dict[str, dict[str, Any]]:
    """How every way goes on, and what it held."""
    from transformers import AutoTokenizer
    from vllm.platforms import current_platform

    from vllm_sepllm.engine.in_process import answer, engine
    from vllm_sepllm.evaluation.facts import chat_ids

    model = str(HERE.parent / MODEL)
    # Many CPUs compute bfloat16, the model's own type, more slowly.
    dtype = "float32" if current_platform.is_cpu() else "auto"
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [document.prompt(tokenizer, fact) for fact in document.facts]
    results = {}
    for name, options in ways(tokenizer, prompts[0]).items():
        print(f"asking SmolLM2 with {name} ...", flush=True)
        with engine(model, options, dtype=dtype, **ENGINE) as llm:
            found = [answer(llm, prompt, NEW_TOKENS) for prompt in prompts]
            chat = answer(llm, chat_ids(tokenizer, CHAT), 3 * NEW_TOKENS)
        results[name] = {
            "replies": [each.text for each in found],
            "slots": sum(each.slots for each in found),
            "chat": chat.text,
        }
    return results


def show(document: Any, results: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"\nA book says, some {DISTANCE} tokens before SmolLM2 is asked for it:\n")
    for fact in document.facts:
        console.print(f"  {escape(fact.sentence)}")
    table = Table(box=box.SIMPLE_HEAVY)
    table.add_column("attention", no_wrap=True)
    for fact in document.facts:
        table.add_column(f"{fact.kind}: {fact.answer}")
    table.add_column("KV held")
    for name, result in results.items():
        cells = []
        for fact, reply in zip(document.facts, result["replies"], strict=True):
            said = escape((reply.split() or ["nothing"])[0].strip(".,"))
            right = fact.is_right(reply)
            cells.append(f"[green]{fact.answer}[/]" if right else f"[red]wrong: {said}[/]")
        table.add_row(name, *cells, f"{result['slots'] / results[FULL]['slots']:.0%}")
    console.print(table)
    console.print(f"And a question without a text: [bold]{CHAT}[/]")
    for name, result in results.items():
        console.print(f"  {name}: [dim]{escape(' '.join(result['chat'].split()))} ...[/]")


def serve_command() -> str:
    """What starts the server for this model, as people paste it into a shell."""
    options = json.dumps({"sepllm": {"window_size": WINDOW, **FACTS_OPTIONS}})
    return f"""\
.venv/bin/vllm serve {MODEL} --attention-backend sepllm \\
    --additional-config '{options}' \\
    --host 127.0.0.1 --max-model-len 8192 --kv-cache-memory-bytes 536870912"""


def curl_command() -> str:
    """And what asks it."""
    messages = json.dumps([{"role": "user", "content": "What is the capital of France?"}])
    return f"""\
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{MODEL}", "messages": {messages},
         "max_tokens": 40, "temperature": 0}}'"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="which text and facts")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT | os.environ)  # what the user has set stays
    from transformers import AutoTokenizer

    from vllm_sepllm.evaluation.facts import hide_facts

    tokenizer = AutoTokenizer.from_pretrained(HERE.parent / MODEL)
    book = tokenizer.encode(BOOK.read_text(encoding="utf-8"), add_special_tokens=False)
    document = hide_facts(book, tokenizer, args.seed, distances=(DISTANCE,))
    show(document, ask_all(document))
    print(f"\nServe it (OpenAI API on port 8000):\n\n  {serve_command()}\n\n  {curl_command()}\n")


if __name__ == "__main__":
    main()
