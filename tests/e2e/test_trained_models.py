"""What was trained under the rule is served under it, with no option given: tokens of the mask."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import MODEL, Reference
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_sepllm.training import apply

ROOT = Path(__file__).resolve().parents[2]
RULE = {"num_sink_tokens": 2, "window_size": 48, "max_separator_tokens": 12}
pytestmark = pytest.mark.e2e

PROMPTS = slice(0, 150), slice(900, 1290)


def trained(model, book, rate=3e-3, steps=3):
    """A few steps, large enough to be seen."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=rate)
    model.train()
    for step in range(steps):
        ids = torch.tensor([book[3000 + 512 * step :][:512]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def check(engine, model, separator_ids, prompts, rule=(2, 48, 12), **request):
    reference = Reference(model, separator_ids, *rule)
    for number, prompt in enumerate(prompts):
        answer = engine.serve({f"{number}": {"prompt": prompt, **request}})[f"{number}"]
        reference.check(prompt, list(answer.outputs[0].token_ids))
    return answer


def test_a_model(engines, book, separator_ids, tmp_path):
    """A recipe's, by the line that it prints at its end."""
    changes = f'training.output_dir="{tmp_path}"', f'model.path="{MODEL}"', "data.length=192"
    changes += "training.max_steps=2", "training.warmup_steps=0", "training.learning_rate=3e-3"
    changes += "training.gradient_accumulation_steps=1", "sepllm.window_size=48"
    options = [part for change in changes for part in ("--set", change)]
    recipe = [sys.executable, "examples/training/post_train.py", *options]
    said = subprocess.run(recipe, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    [line] = [line for line in said.splitlines() if "vllm serve" in line]
    folder, *options = shlex.split(line[line.index("vllm serve") :])[2:]
    assert options == ["--attention-backend", "sepllm"]
    engine = engines(sepllm=None, model=folder, attention_backend="sepllm")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    untrained = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert any(
        not torch.equal(*pair)
        for pair in zip(model.parameters(), untrained.parameters(), strict=True)
    )
    check(engine, model, separator_ids, [book[part] for part in PROMPTS], (4, 48))


def test_an_adapter(engines, book, separator_ids, tmp_path):
    """Under the rule that it carries; vLLM adds it up in another order than a merged model."""
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    options = {"task_type": "CAUSAL_LM", "r": 8, "target_modules": targets}
    model = get_peft_model(base, LoraConfig(**options))
    attached = apply(model, RULE, AutoTokenizer.from_pretrained(MODEL))
    trained(model, book, rate=3e-2).save_pretrained(tmp_path)
    attached.remove()
    engine = engines(sepllm=RULE, enable_lora=True, max_loras=2, max_lora_rank=8)
    lora = LoRARequest("trained", 1, str(tmp_path))
    prompts = [book[part] for part in PROMPTS]
    answer = check(engine, model.merge_and_unload(), separator_ids, prompts, lora=lora)
    plain = engine.serve({"plain": {"prompt": prompts[-1]}})["plain"]
    assert answer.outputs[0].token_ids != plain.outputs[0].token_ids, "the adapter changed nothing"
