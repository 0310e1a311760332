"""What was trained under the rule is served under it, with no option given: tokens of the mask."""

import pytest
import torch
from helpers import MODEL, Reference
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_sepllm.training import apply

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


def check(engine, model, separator_ids, prompts, **request):
    reference = Reference(model, separator_ids, 2, 48, 12)
    for number, prompt in enumerate(prompts):
        answer = engine.serve({f"{number}": {"prompt": prompt, **request}})[f"{number}"]
        reference.check(prompt, list(answer.outputs[0].token_ids))
    return answer


def test_a_model(engines, book, separator_ids, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    attached = apply(model, RULE, tokenizer)
    trained(model, book).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    attached.remove()
    engine = engines(sepllm=None, model=str(tmp_path), attention_backend="sepllm")
    check(engine, model, separator_ids, [book[part] for part in PROMPTS])


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
