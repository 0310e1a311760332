"""Post-train a model under SepLLM: all weights, or an adapter, by the text or by its own logits.

    python examples/training/post_train.py [--set method.loss="cross-entropy"]

A model that was never trained under the mask loses by it; a little training wins part of it back.
With ``loss = "distillation"`` the model learns to predict what it predicted with full attention.
The learning rate starts anew (cosine). Stopped and started again, it goes on where it was.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import transformers
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
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_sepllm.training import apply

RANKS = 1, 8, 16, 32, 64, 128, 256, 320, 512  # of adapters that vLLM has room for, at most


class DistillationTrainer(transformers.Trainer):
    """The divergence from what a teacher predicts (KL, in nats per token) is the loss."""

    teacher: Any = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated ones are divided

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        ids = inputs["input_ids"]
        kind = ids.device.type
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=self.args.bf16):
            self.teacher.to(ids.device)
            wanted = self.teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        outputs = model(input_ids=ids, use_cache=False)
        found = outputs.logits.float().log_softmax(-1)
        nats = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum")
        loss = nats / ids.numel()
        return (loss, outputs) if return_outputs else loss


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def with_adapter(model: Any, options: dict[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def main() -> None:
    given = configuration(__file__)
    data, options, method = given["data"], given["training"], given["method"]
    one_of("method.loss", method["loss"], "cross-entropy", "distillation")
    one_of("method.train", method["train"], "all weights", "adapter")
    folder = ROOT / options["output_dir"]
    options["output_dir"] = str(folder)
    base = model_at("model.path", given["model"]["path"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = pieces(tokenizer, data["texts"], data["length"])
    held_out = pieces(tokenizer, data["held_out"], data["length"], data["held_out_pieces"])
    model = load(base)
    if method["train"] == "adapter":
        transformers.set_seed(options.get("seed", 0))
        model = with_adapter(model, given["adapter"])
    apply(model, given["sepllm"], tokenizer)
    summary: dict[str, Any] = {"before": perplexity(model, held_out)}
    print(f"perplexity of held-out text, before: {summary['before']:.2f}", flush=True)
    claim(folder, given)
    if method["loss"] == "distillation":
        DistillationTrainer.teacher = load(base).eval()
        trainer = train(model, rows, options, DistillationTrainer)
    else:
        trainer = train(model, rows, options)
    summary["after"] = perplexity(model, held_out)
    summary["log"] = trainer.state.log_history
    trainer.save_model(str(folder / "model"))
    tokenizer.save_pretrained(folder / "model")
    (folder / "summary.json").write_text(json.dumps(summary, indent=2))
    print(f"perplexity of held-out text, after: {summary['after']:.2f}")
    path, backend = folder / "model", ("--attention-backend", "sepllm")
    if method["train"] == "adapter":
        rule = "--additional-config", json.dumps({"sepllm": given["sepllm"]})
        rank = min((rank for rank in RANKS if rank >= given["adapter"]["r"]), default=0)
        lora = "--enable-lora", "--max-lora-rank", str(rank)
        modules = "--lora-modules", f"trained={path}"
        if rank:
            say_how_to_serve(base, *backend, *rule, *lora, *modules)
        else:
            print(f"vLLM serves adapters of rank {RANKS[-1]} at most: merge this one to serve it")
    else:
        say_how_to_serve(path, *backend)


if __name__ == "__main__":
    main()
