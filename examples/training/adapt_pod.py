"""Adapt a model to PoD's shared distant keys, beside the same training with keys of its own.

    python examples/training/adapt_pod.py [--set method.least_similarity=0.6]

PoD (arXiv 2412.02252) is a method that SepLLM is compared with; vLLM does not serve it. Both
models see the same tokens in the same order. Stopped and started again, it goes on.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from common import ROOT, claim, configuration, model_at, perplexity, pieces, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_sepllm.baselines.common import num_kv_heads
from vllm_sepllm.baselines.pod import apply_pod, make_blocks, own_keys, similarities


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def main() -> None:
    given = configuration(__file__)
    data, options, method = given["data"], given["training"], given["method"]
    path, length = model_at("model.path", given["model"]["path"]), data["length"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = pieces(tokenizer, data["texts"], length)
    held_out = pieces(tokenizer, data["held_out"], length, data["held_out_pieces"])
    root = ROOT / options["output_dir"]
    claim(root, given)
    model = load(path)
    num_layers, num_heads = model.config.num_hidden_layers, num_kv_heads(model)
    if method["layers_of_a_block"]:
        size = method["layers_of_a_block"]
        shared: Any = [(layer // size * size,) * num_heads for layer in range(num_layers)]
    else:
        texts = [row["input_ids"] for row in rows[: method["texts_compared"]]]
        shared = make_blocks(similarities(model, texts), method["least_similarity"])
    summary: dict[str, Any] = {"blocks": shared, "ways": {}}
    for name, blocks in (("own keys", own_keys(num_layers, num_heads)), ("PoD", shared)):
        model = load(path)
        state = apply_pod(model, blocks, method["num_sink_tokens"], method["recent"])
        before = perplexity(model, held_out)
        folder = root / name.replace(" ", "_")
        trainer = train(model, rows, {**options, "output_dir": str(folder)})
        after = perplexity(model, held_out)
        tokens = trainer.state.num_input_tokens_seen
        found = {"before": before, "after": after, "saved": state.saved, "tokens": tokens}
        summary["ways"][name] = found
        print(f"{name}: perplexity {before:.2f}, after training {after:.2f}", flush=True)
    (root / "summary.json").write_text(json.dumps(summary, indent=2))
    print(f"{summary['ways']['PoD']['saved']:.0%} of a distant token's KV cache would be saved")


if __name__ == "__main__":
    main()
