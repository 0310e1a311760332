"""SmolLM2 is asked for a number that stands far back in a text: the second part of `make demo`.

    python examples/demo_answers.py             # four ways to attend, and the table
    python examples/demo_answers.py --seed 7    # another text, person and number

Every way gets the same question behind the same thousand tokens of a book. What it holds was read
from vLLM's scheduler when the last token of the answer was computed.
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
KEEP = ["separators", "special", "digits", "capitalized"]
NEW_TOKENS = 24
CHAT = "What is the capital of France, and what is it known for?"
FULL = "full attention"

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
    "enable_prefix_caching": False,
    "use_tqdm_on_load": False,
}


def ways(tokenizer: Any, message: str) -> dict[str, dict[str, Any] | None]:
    """Names of what a query attends to, with SepLLM's options; ``None`` is vLLM's own attention."""
    from vllm_sepllm.config import SepLLMConfig
    from vllm_sepllm.evaluation.retrieval import chat_ids
    from vllm_sepllm.evaluation.share import window_of_equal_share

    plain = SepLLMConfig(window_size=WINDOW)
    equal = window_of_equal_share(plain, tokenizer, chat_ids(tokenizer, message))
    return {
        FULL: None,
        "SepLLM": {"window_size": WINDOW},
        "StreamingLLM, as much KV": {"policy": "streaming", "window_size": equal.window_size},
        "SepLLM, names and numbers kept too": {"window_size": WINDOW, "keep": KEEP},
    }


def ask_all(question: Any) -> dict[str, dict[str, Any]]:
    """What every way answers, and what it held."""
    from transformers import AutoTokenizer
    from vllm.platforms import current_platform

    from vllm_sepllm.engine.in_process import answer, engine
    from vllm_sepllm.evaluation.retrieval import chat_ids

    model = str(HERE.parent / MODEL)
    # Many CPUs compute bfloat16, the model's own type, more slowly.
    dtype = "float32" if current_platform.is_cpu() else "auto"
    tokenizer = AutoTokenizer.from_pretrained(model)
    results = {}
    for name, options in ways(tokenizer, question.message).items():
        print(f"asking SmolLM2 with {name} ...", flush=True)
        with engine(model, options, dtype=dtype, **ENGINE) as llm:
            found = answer(llm, chat_ids(tokenizer, question.message), NEW_TOKENS)
            chat = answer(llm, chat_ids(tokenizer, CHAT), NEW_TOKENS)
        results[name] = {
            "answer": found.text,
            "right": question.is_right(found.text),
            "slots": found.slots,
            "chat": chat.text,
        }
    return results


def show(question: Any, results: dict[str, dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=box.SIMPLE_HEAVY, title="SmolLM2-135M is asked for a number it has read")
    for column in ("attention", "answer", "", "KV held"):
        table.add_column(column)
    for name, result in results.items():
        mark = "[green]right[/]" if result["right"] else "[red]wrong[/]"
        text, share = " ".join(result["answer"].split()), result["slots"] / results[FULL]["slots"]
        table.add_row(name, escape(text), mark, f"{share:.0%}")
    console.print(
        f'\nA book says "{question.fact}", and {question.distance} tokens later comes the question.'
    )
    console.print(table)
    console.print(f"And a question without a text: [bold]{CHAT}[/]")
    for name, result in results.items():
        console.print(f"  {name}: [dim]{escape(' '.join(result['chat'].split()))} ...[/]")


def serve_command() -> str:
    """What starts the server for this model, as people paste it into a shell."""
    options = json.dumps({"sepllm": {"window_size": WINDOW, "keep": KEEP}})
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
    parser.add_argument("--seed", type=int, default=0, help="which text, person and number")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT | os.environ)  # what the user has set stays
    from transformers import AutoTokenizer

    from vllm_sepllm.evaluation.retrieval import ask_for_number

    tokenizer = AutoTokenizer.from_pretrained(HERE.parent / MODEL)
    question = ask_for_number(BOOK.read_text(encoding="utf-8"), tokenizer, args.seed)
    show(question, ask_all(question))
    print(f"\nServe it (OpenAI API on port 8000):\n\n  {serve_command()}\n\n  {curl_command()}\n")


if __name__ == "__main__":
    main()
