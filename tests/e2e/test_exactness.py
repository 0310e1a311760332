"""Greedy tokens of the engine equal a Hugging Face model under the explicit mask, in float32."""

import copy

import pytest
import torch
from helpers import Reference, find_separators
from torch._dynamo.utils import counters

from vllm_sepllm.oracle.dense_mask import (
    KeptAfter,
    first_difference,
    masked_logits,
    sepllm_mask,
)

pytestmark = pytest.mark.e2e

# window, sinks, block size, prompt chunk. Windows of whole pages, of parts of pages and wider
# than the context; chunks of less than a page and of the whole prompt.
CASES = [
    (1, 0, 16, 64),
    (1, 33, 128, 128),
    (16, 1, 32, 100),
    (16, 4, 16, 2048),
    (64, 33, 128, 64),
    (64, 4, 32, 256),
    (100, 0, 128, 256),
    (256, 4, 32, 512),
    (256, 0, 16, 96),
    (3000, 4, 32, 256),
]


def prompts(book, separator_ids):
    """Longer and shorter than any window, two tokens, and nothing but separators."""
    return [
        book[:900],
        book[100:102],
        book[3000:3342],
        book[50:60],
        book[400:900],
        list(separator_ids[:2]) * 150,
    ]


@pytest.mark.parametrize(("window", "sinks", "block_size", "chunk"), CASES)
def test_greedy_tokens_equal_the_reference(
    engines, book, reference_model, separator_ids, window, sinks, block_size, chunk
):
    engine = engines(
        sepllm={"window_size": window, "num_sink_tokens": sinks},
        block_size=block_size,
        max_num_batched_tokens=chunk,
    )
    texts = prompts(book, separator_ids)
    for prompt, tokens in zip(texts, engine.tokens(texts, max_tokens=28), strict=True):
        assert len(tokens) == 28
        difference = first_difference(reference_model, prompt, tokens, separator_ids, sinks, window)
        assert difference is None, f"prompt of {len(prompt)} tokens, {difference}"
    engine.check_integrity()
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_the_comparison_can_fail(engines, book, reference_model, separator_ids):
    """Tokens of one mask do not pass for another's."""
    engine = engines(sepllm={"window_size": 16, "num_sink_tokens": 4})
    prompt = book[:1200]
    tokens = engine.tokens([prompt], max_tokens=40)[0]
    for sinks, window, separators in [(4, 64, separator_ids), (0, 16, separator_ids), (4, 16, ())]:
        assert first_difference(reference_model, prompt, tokens, separators, sinks, window)


def test_the_reference_in_pieces(book, reference_model, separator_ids, monkeypatch):
    """Long sequences go through the model in pieces."""
    exact = copy.deepcopy(reference_model).double()
    mask = sepllm_mask(book[:1000], separator_ids, 4, 64)
    whole = masked_logits(exact, book[:1000], mask)
    monkeypatch.setattr("vllm_sepllm.oracle.dense_mask.PIECE", 300)
    pieces = masked_logits(exact, book[:1000], mask)
    torch.testing.assert_close(pieces, whole, rtol=1e-9, atol=1e-9)


def test_requests_that_come_while_others_decode(engines, book, reference_model, separator_ids):
    """Prefill and decode share batches, and requests change rows as others end."""
    engine = engines(sepllm={"window_size": 64})
    texts = [book[i * 131 : i * 131 + 40 + 173 * i] for i in range(8)]
    lengths = [30, 5, 60, 12, 45, 20, 8, 33]
    done, waiting, step = {}, list(range(8)), 0
    while len(done) < len(texts):
        if waiting and step % 3 == 0:
            i = waiting.pop(0)
            engine.add(f"r{i}", texts[i], max_tokens=lengths[i])
        for output in engine.step():
            if output.finished:
                done[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
    for i, prompt in enumerate(texts):
        tokens = done[f"r{i}"]
        assert len(tokens) == lengths[i]
        assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None


def test_composed_separators(engines, book, reference_model):
    options = {"window_size": 32, "separator_match": "composed"}
    engine = engines(sepllm=options)
    composed = find_separators(separator_match="composed")
    assert set(composed) > set(find_separators())
    tokens = engine.tokens([book[:700]], max_tokens=40)[0]
    assert first_difference(reference_model, book[:700], tokens, composed, 4, 32) is None


def test_no_separators_is_sinks_and_window(engines, book, reference_model):
    engine = engines(sepllm={"window_size": 32, "separator_token_ids": []})
    tokens = engine.tokens([book[:700]], max_tokens=40)[0]
    assert first_difference(reference_model, book[:700], tokens, (), 4, 32) is None


@pytest.mark.parametrize(
    ("options", "interval"),
    [
        ({"policy": "streaming"}, None),
        ({"policy": "streaming", "num_sink_tokens": 0}, None),
        ({"policy": "fixed_interval", "interval": 5}, 5),
    ],
    ids=["streaming", "window alone", "fixed interval"],
)
def test_other_policies(engines, book, reference_model, options, interval):
    engine = engines(sepllm={"window_size": 64, **options}, enable_prefix_caching=True)
    texts = [book[:700], book[100:130], [*book[:350], *book[3000:3400]]]
    for _ in range(2):  # cold, then warm
        outputs = engine.generate(texts, 24)
        for prompt, output in zip(texts, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            mask = sepllm_mask(prompt + tokens, (), options.get("num_sink_tokens", 4), 64, interval)
            logits = masked_logits(reference_model, prompt + tokens, mask)
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    assert [output.num_cached_tokens for output in outputs] == [672, 0, 736]
    engine.check_empty()


def ids_of(tokenizer, belongs):
    """Ids by the text that each adds behind a letter, read one by one."""
    [anchor] = tokenizer.encode("a", add_special_tokens=False)
    texts = (tokenizer.decode([anchor, i])[1:] for i in range(len(tokenizer)))
    return tuple(i for i, text in enumerate(texts) if belongs(text))


def test_keep_classes(engines, book, tokenizer, reference_model, separator_ids):
    """Of a text with names and numbers; cold, then from the prefix cache."""
    names = ids_of(tokenizer, lambda text: text.strip()[:1].isupper())
    digits = ids_of(tokenizer, lambda text: any(map(str.isdecimal, text)) and text.upper() == text)
    sums = "Anna sold 48 clips in April, and half as many in May. How many did she sell in 2024? "
    text = tokenizer.encode(sums, add_special_tokens=False) * 6
    [the] = tokenizer.encode(" the", add_special_tokens=False)
    keep = ["capitalized", "digits", " the", separator_ids[1]]
    engine = engines(sepllm={"window_size": 32, "keep": keep}, enable_prefix_caching=True)
    assert engine.llm.reset_prefix_cache()
    prompts, kept = [book[:700], text], (*names, *digits, the, separator_ids[1])
    for _ in range(2):
        outputs = engine.generate(prompts, 30)
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = output.outputs[0].token_ids
            assert first_difference(reference_model, prompt, tokens, kept, 4, 32) is None
    assert min(output.num_cached_tokens for output in outputs) >= 128
    assert first_difference(reference_model, prompts[0], outputs[0].outputs[0].token_ids, (), 4, 32)
    engine.check_empty()


def test_spans(engines, book, tokenizer, reference_model, separator_ids):
    """Names keep four tokens behind themselves and digits one, to the end of their segment; alone
    and together, cold and from the prefix cache, in the prompt and behind it."""
    names = ids_of(tokenizer, lambda text: text.strip()[:1].isupper())
    digits = ids_of(tokenizer, lambda text: any(map(str.isdecimal, text)) and text.upper() == text)
    ends = ids_of(
        tokenizer,
        lambda text: any(map(text.__contains__, ".?!;\n")) and not any(map(str.isalnum, text)),
    )
    after = KeptAfter({**dict.fromkeys(names, 4), **dict.fromkeys(digits, 1)}, frozenset(ends))
    kept = {*names, *digits, *separator_ids}
    keep = ["capitalized", "digits", "separators"]
    sepllm = {"window_size": 32, "keep": keep, "keep_after": {"capitalized": 4, "digits": 1}}
    engine = engines(sepllm=sepllm, enable_prefix_caching=True, max_num_batched_tokens=100)
    assert engine.llm.reset_prefix_cache()
    sums = "Anna sold 48 clips in April, and half as many in May. How many did she sell in 2024? "
    text = tokenizer.encode(sums, add_special_tokens=False) * 6
    reference = Reference(reference_model, kept, 4, 32, after=after)
    for prompts in ([book[:700]], [book[:700], text, book[:330] + book[3000:3100]]):
        for output in engine.generate(prompts, 30, logprobs=0):
            reference.check_output(output)
    assert output.num_cached_tokens >= 300
    without = Reference(reference_model, kept, 4, 32)
    with pytest.raises(AssertionError, match=r"step \d+: \d+ instead of|another log-probability"):
        without.check_output(engine.generate([book[:700]], 30, logprobs=0)[0])
    engine.check_empty()


def test_compiled(engines, book, first_layers, separator_ids, monkeypatch, tmp_path):
    """As ``vllm serve`` runs where nothing else is said."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # an earlier run's code may lie in it
    model, path = first_layers(2)
    before = counters["stats"]["unique_graphs"]
    engine = engines(sepllm={"window_size": 64}, model=path, enforce_eager=False)
    config = engine.llm.llm_engine.vllm_config.compilation_config
    assert config.backend == "inductor"
    assert counters["stats"]["unique_graphs"] > before, "nothing was compiled"
    reference = Reference(model, separator_ids, 4, 64)
    prompts = [book[:700], book[3000:3342]]
    for output in engine.generate(prompts, 30, logprobs=0):
        reference.check_output(output)
    engine.check_empty()


def test_a_keep_class_of_ones_own(engines, added_class, book, tokenizer, reference_model):
    """CONTRIBUTING's example; the oracle is told which ids it keeps."""
    engine = engines(sepllm={"keep": [added_class], "window_size": 32})
    tokens = list(engine.generate([book[:300]], 24)[0].outputs[0].token_ids)
    ids = ids_of(tokenizer, lambda text: "-" in text)
    assert first_difference(reference_model, book[:300], tokens, ids, 4, 32) is None
    engine.check_empty()


def test_a_policy_of_ones_own(engines, added_policy, book, reference_model):
    """CONTRIBUTING's example; the oracle is told which ids it keeps."""
    engine = engines(sepllm={"policy": added_policy, "window_size": 32})
    tokens = list(engine.generate([book[:300]], 24)[0].outputs[0].token_ids)
    even = range(0, reference_model.config.vocab_size, 2)
    assert first_difference(reference_model, book[:300], tokens, even, 4, 32) is None
    engine.check_empty()


def test_log_probabilities_equal_the_reference(engines, book, reference_model, separator_ids):
    """Not only the best token: prompt and sample log-probabilities, in float32."""
    engine = engines(sepllm={"window_size": 64})
    prompt = book[:900]
    output = engine.generate([prompt], max_tokens=8, logprobs=1, prompt_logprobs=1)[0]
    tokens = list(output.outputs[0].token_ids)
    ids = prompt + tokens
    mask = sepllm_mask(ids, separator_ids, 4, 64)
    picked = torch.tensor(ids[1:])[:, None]

    def log_probabilities(model):
        logits = masked_logits(model, ids, mask)[:-1]
        return logits.log_softmax(-1).gather(1, picked)[:, 0].double()

    exact = log_probabilities(copy.deepcopy(reference_model).double())
    rounded = log_probabilities(reference_model)
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    given = torch.tensor([entry[t].logprob for entry, t in zip(entries, ids[1:], strict=True)])
    # What float32 alone does to the same model, twice; and the last bit of the largest value.
    bound = 2 * (rounded - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (given.double() - exact).abs().max() <= bound


def test_a_window_over_the_context_equals_vllms_own_attention(engines, book):
    texts = [book[:1500], book[77:79], book[2000:2700]]
    ours = engines(sepllm={"window_size": 2048}).tokens(texts, max_tokens=60)
    dense = engines(sepllm=None).tokens(texts, max_tokens=60)
    assert ours == dense


def test_bfloat16_agrees_within_its_rounding(engines, book, reference_model, separator_ids):
    """No further from float32 than twice the same model in bfloat16 under the same mask."""
    from helpers import MODEL
    from transformers import AutoModelForCausalLM

    engine = engines(sepllm={"window_size": 64}, dtype="bfloat16")
    rounded_model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    for prompt in (book[:1000], book[5000:5300]):
        output = engine.generate([prompt], max_tokens=1, prompt_logprobs=0)[0]
        mask = sepllm_mask(prompt, separator_ids, 4, 64)
        picked = torch.tensor(prompt[1:])[:, None]

        def log_probabilities(model, ids=prompt, mask=mask, picked=picked):
            logits = masked_logits(model, ids, mask)[:-1].float()
            return logits.log_softmax(-1).gather(1, picked)[:, 0]

        exact, rounded = log_probabilities(reference_model), log_probabilities(rounded_model)
        entries = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
        given = torch.tensor([entry[token].logprob for entry, token in entries])
        assert (given - exact).abs().mean() <= 2 * (rounded - exact).abs().mean()
        assert (given - exact).abs().max() <= 2 * (rounded - exact).abs().max()
