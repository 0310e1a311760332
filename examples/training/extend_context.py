"""Extend a model's context: fine-tune it on texts longer than it was trained on.

    python examples/training/extend_context.py [--set method.attention="S2-Attn"]

Positions are interpolated (linear rotary scaling), an adapter is trained, with embeddings and norms
as LongLoRA does, and while it is trained tokens attend sparsely: SinkLoRA's SF-Attn, LongLoRA's
S2-Attn, SepLLM, or not (``full``). The result is evaluated with full attention, or under SepLLM if
it was trained under it. ``interpolation`` trains nothing.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import transformers
from common import (
    ROOT,
    TrainerBesideAdapter,
    claim,
    configuration,
    model_at,
    one_of,
    perplexity,
    pieces,
    say_how_to_serve,
    train,
)
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_sepllm.training import apply, apply_sink_lora

GROUPS = "SF-Attn", "S2-Attn"


def load(path: str, factor: float, length: int) -> Any:
    """With positions divided by a factor, for texts of so many tokens."""
    config = AutoConfig.from_pretrained(path)
    rotary = dict(config.rope_parameters)
    config.rope_parameters = {**rotary, "rope_type": "linear", "factor": factor}
    config.max_position_embeddings = length
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32)
    if hasattr(model.config, "sepllm"):  # an earlier rule does not hold any more
        del model.config.sepllm
    return model


def group_size(length: int, groups: int) -> int:
    """Tokens of each group of a text, an even number: groups are shifted by half of one."""
    if length % (2 * groups):
        longer = -(-length // (2 * groups)) * 2 * groups
        raise SystemExit(
            f"data.length={length} is not {groups} groups (method.groups) of an even number of "
            f"tokens: set data.length={longer}"
        )
    return length // groups


def with_adapter(model: Any, options: dict[str, Any]) -> Any:
    """LongLoRA's: low rank in attention, embeddings and norms as they are."""
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "norm" in name or "embed" in name:
            parameter.requires_grad_()
    return model


def main() -> None:
    given = configuration(__file__)
    data, options, how = given["data"], given["training"], given["method"]["attention"]
    one_of("method.attention", how, "interpolation", "full", "SepLLM", *GROUPS)
    folder = ROOT / options["output_dir"] / how
    size = group_size(data["length"], given["method"]["groups"]) if how in GROUPS else 0
    base = model_at("model.path", given["model"]["path"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = pieces(tokenizer, data["texts"], data["length"])
    held_out = pieces(tokenizer, data["held_out"], data["length"], data["held_out_pieces"])
    transformers.set_seed(options.get("seed", 0))
    model = with_adapter(load(base, given["model"]["factor"], data["length"]), given["adapter"])
    attached = None
    if how == "SepLLM":
        attached = apply(model, given["sepllm"], tokenizer)
    elif how in GROUPS:
        attached = apply_sink_lora(model, size, **given["method"][how])
    claim(folder, given)
    summary: dict[str, Any] = {"attention": how}
    if how != "interpolation":
        options = {**options, "output_dir": str(folder)}
        trainer = train(model, rows, options, TrainerBesideAdapter)
        summary["log"] = trainer.state.log_history
    if how in GROUPS:
        assert attached is not None
        attached.remove()
    summary["perplexity of held-out text"] = perplexity(model, held_out)
    merged = model.merge_and_unload()
    merged.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print(f"{how}: perplexity of held-out text {summary['perplexity of held-out text']:.2f}")
    backend = ("--attention-backend", "sepllm") if how == "SepLLM" else ()
    say_how_to_serve(folder / "model", *backend)


if __name__ == "__main__":
    main()
