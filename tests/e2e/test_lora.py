"""Adapters: each request has its own weights, its own keys and values, its own cached pages."""

import copy
import json

import pytest
import torch
from helpers import MODEL, SMALL_POOL, Reference
from safetensors.torch import save_file

pytestmark = pytest.mark.e2e

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = ("one", "two")


def linear_layers(model):
    """The layers an adapter changes, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if name.split(".")[-1] in TARGETS}


def random_adapter(model, seed):
    """Low-rank factors by layer: ``A`` is ``[rank, inputs]``, ``B`` is ``[outputs, rank]``."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, layer in linear_layers(model).items():
        outputs, inputs = layer.weight.shape
        down = torch.randn(RANK, inputs, generator=generator) / inputs**0.5
        factors[name] = down, 0.05 * torch.randn(outputs, RANK, generator=generator)
    return factors


def save_adapter(factors, path):
    """In the format of the PEFT library."""
    path.mkdir()
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": MODEL}
    config |= {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))


def merged(model, factors):
    """A copy of the model with the adapter added to its weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in linear_layers(model).items():
            down, up = factors[name]
            layer.weight += ALPHA / RANK * (up @ down)
    return model


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, reference_model, separator_ids, reference):
    """A request's adapter and the reference for it, by name; ``None`` is the model itself."""
    from vllm.lora.request import LoRARequest

    root, found = tmp_path_factory.mktemp("adapters"), {None: (None, reference)}
    for number, name in enumerate(NAMES, 1):
        factors = random_adapter(reference_model, number)
        save_adapter(factors, root / name)
        model = merged(reference_model, factors)
        found[name] = (
            LoRARequest(name, number, str(root / name)),
            Reference(model, separator_ids, 4, 64),
        )
    return found


@pytest.fixture
def engine(engines):
    """One adapter slot more than there are adapters.

    vLLM 0.32 on CPU computes requests without an adapter with the last slot, which must be empty.
    """
    engine = engines(**SMALL_POOL, enable_lora=True, max_loras=len(NAMES) + 1, max_lora_rank=RANK)
    assert engine.llm.reset_prefix_cache()
    yield engine
    engine.check_empty()


def test_adapters_share_batches(engine, intruder, adapters, book):
    """Two adapters and none, on the same prompts, cold and from the cache."""
    prompts = [book[:300], book[2000:2045]]
    requests = {
        f"{name} {i}": {"prompt": prompt, "max_tokens": 20, "lora": lora}
        for i, prompt in enumerate(prompts)
        for name, (lora, _) in adapters.items()
    }
    for _ in range(2):
        answers = engine.serve(requests, intruder)
        for i, prompt in enumerate(prompts):
            for name, (_, reference) in adapters.items():
                reference.check(prompt, list(answers[f"{name} {i}"].outputs[0].token_ids))
    texts = {tuple(answers[f"{name} 0"].outputs[0].token_ids) for name in adapters}
    assert len(texts) == 3, "an adapter changed nothing"


def test_cached_pages_belong_to_one_adapter(engine, adapters, book):
    """The same prompt is cold under every adapter, and warm the second time."""
    prompt = book[:400]
    for cached in (0, 384):
        for lora, reference in adapters.values():
            answer = engine.serve({"r": {"prompt": prompt, "lora": lora}})["r"]
            assert answer.num_cached_tokens == cached
            reference.check(prompt, list(answer.outputs[0].token_ids))


def test_running_requests_share_pages_only_under_one_adapter(engine, adapters, book):
    """Two requests of one prompt under each adapter, all found in the cache."""
    prompt = book[:400]
    loras = {name: lora for name, (lora, _) in adapters.items()}
    engine.serve({f"{name}": {"prompt": prompt, "lora": lora} for name, lora in loras.items()})
    for name, lora in loras.items():
        engine.add(f"{name} a", prompt, lora=lora)
        engine.add(f"{name} b", prompt, lora=lora)
    engine.step()
    held = {}
    for request in engine.scheduler.requests.values():
        pages = {
            block.block_id
            for manager in engine.managers
            for block in manager.req_to_blocks[request.request_id]
            if not block.is_null
        }
        held.setdefault(request.lora_request and request.lora_request.name, []).append(pages)
    assert held.keys() == adapters.keys()
    for first, second in held.values():
        assert first & second
    owners = [first | second for first, second in held.values()]
    assert sum(map(len, owners)) == len(set().union(*owners))
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.step():
            name = output.lora_request and output.lora_request.name
            adapters[name][1].check(prompt, list(output.outputs[0].token_ids))
