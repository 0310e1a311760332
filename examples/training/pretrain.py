"""Train a small model from scratch under SepLLM, beside the same model with full attention.

    python examples/training/pretrain.py [--set training.max_steps=500]

Both see the same tokens in the same order. The rule travels in the model's ``config.json``, so the
line that is printed at the end serves it as it was trained. Stopped and started again, it goes on.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from common import (
    ROOT,
    claim,
    configuration,
    model_at,
    one_of,
    perplexity,
    pieces,
    say_how_to_serve,
    train,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_sepllm.training import apply
from vllm_sepllm.training.flops import ModelSize, causal_pairs
from vllm_sepllm.training.plan import KeptPattern, pack


def new_model(sizes: dict[str, Any], seed: int) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def pairs(pattern: KeptPattern, rows: list[dict[str, list[int]]]) -> float:
    """Pairs of a query and a key that it sees, in one layer, mean of some rows."""
    found = [pack(pattern.text_plans(row["input_ids"])).num_pairs for row in rows[:20]]
    return sum(found) / len(found)


def main() -> None:
    given = configuration(__file__)
    data, options = given["data"], given["training"]
    names = given["model"]["attention"]
    names = [names] if isinstance(names, str) else names
    for name in names:
        one_of("model.attention", name, "dense", "sepllm")
    tokenizer = AutoTokenizer.from_pretrained(
        model_at("model.tokenizer", given["model"]["tokenizer"])
    )
    rows = pieces(tokenizer, data["texts"], data["length"])
    held_out = pieces(tokenizer, data["held_out"], data["length"], data["held_out_pieces"])
    root, summary = ROOT / options["output_dir"], {}
    claim(root, given)
    for name in names:
        model = new_model(given["model"]["sizes"], given["model"]["seed"])
        num_pairs = float(causal_pairs(data["length"]))
        if name == "sepllm":
            attached = apply(model, given["sepllm"], tokenizer)
            dense = len(attached.layers.dense) / model.config.num_hidden_layers
            num_pairs = dense * num_pairs + (1 - dense) * pairs(attached.pattern, rows)
        folder = root / name
        trainer = train(model, rows, {**options, "output_dir": str(folder)})
        trainer.save_model(str(folder / "model"))
        tokenizer.save_pretrained(folder / "model")
        tokens = trainer.state.num_input_tokens_seen
        of_a_text = ModelSize.of(model).operations(data["length"], round(num_pairs))
        operations = of_a_text * tokens // data["length"]
        summary[name] = {
            "perplexity of held-out text": perplexity(model, held_out),
            "tokens": tokens,
            "operations": operations,
            "log": trainer.state.log_history,
        }
        print(f"{name}: {summary[name]['perplexity of held-out text']:.2f}", flush=True)
    (root / "summary.json").write_text(json.dumps(summary, indent=2))
    best = "sepllm" if "sepllm" in summary else "dense"
    backend = ("--attention-backend", "sepllm") if best == "sepllm" else ()
    say_how_to_serve(root / best / "model", *backend)


if __name__ == "__main__":
    main()
