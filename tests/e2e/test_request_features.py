"""What a request may ask for, with ample memory and with too little.

Every answer is compared with the Hugging Face model under the explicit mask: each token is the
one the reference picks under the same rule. With too little memory each request is preempted
while it decodes, gives all pages back, and is computed again.
"""

import json
from itertools import pairwise

import pytest
import regex
import torch
from helpers import EOS, SMALL_POOL, tokenizer

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def plain(book, reference):
    """A prompt and its greedy continuation by the reference alone, without an engine."""
    prompt, tokens = book[3000:3190], []
    for _ in range(32):
        tokens.append(int(reference.logits([*prompt, *tokens])[-1].argmax()))
    return prompt, tokens


def encode(text):
    return tokenizer().encode(text, add_special_tokens=False)


def decode(ids):
    return tokenizer().decode(ids)


# Stopping


def test_stop_strings(engine, intruder, plain):
    """One that begins in one token and ends in the next, left out of the text or left in."""
    prompt, tokens = plain
    texts = [decode([token]) for token in tokens]
    stops = [a[-2:] + b[:2] for a, b in pairwise(texts[12:])]
    stop = next(s for s in stops if len(s) == 4 and s not in decode(tokens[:12]))
    count = next(n for n in range(len(tokens)) if stop in decode(tokens[:n]))
    text = decode(tokens[:count])
    requests = {
        "without": {"prompt": prompt, "stop": [stop, "never said"]},
        "with": {"prompt": prompt, "stop": stop, "include_stop_str_in_output": True},
    }
    answers = engine.serve(requests, intruder)
    for name, end in (("without", 0), ("with", len(stop))):
        answer = answers[name].outputs[0]
        assert list(answer.token_ids) == tokens[:count]
        assert answer.text == text[: text.index(stop) + end]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)


def test_stop_tokens_and_min_tokens(engine, intruder, plain, reference):
    prompt, tokens = plain
    last = tokens[9]
    first = tokens.index(last)
    requests = {
        "stop": {"prompt": prompt, "stop_token_ids": [last]},
        "later": {"prompt": prompt, "stop_token_ids": [last], "min_tokens": 20, "max_tokens": 40},
    }
    answers = engine.serve(requests, intruder)
    stopped, later = (answers[name].outputs[0] for name in requests)
    assert list(stopped.token_ids) == tokens[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", last)

    def rule(row, before):
        if len(before) < 20:
            row[[last, EOS]] = -torch.inf

    reference.check(prompt, later.token_ids, rule)
    assert len(later.token_ids) > 20 > first
    assert last not in later.token_ids[:-1]
    assert later.finish_reason == ("stop" if later.token_ids[-1] == last else "length")


# Changed logits


def add_bias(bias):
    def rule(row, before):
        for token, value in bias.items():
            row[token] += value

    return rule


def allow(token_ids):
    def rule(row, before):
        allowed = row[token_ids].clone()
        row[:] = -torch.inf
        row[token_ids] = allowed

    return rule


def ban(sequences):
    def rule(row, before):
        for *head, last in sequences:
            if before[len(before) - len(head) :] == head:
                row[last] = -torch.inf

    return rule


def penalise(prompt, repetition, presence, frequency):
    def rule(row, before):
        seen = torch.tensor(sorted({*prompt, *before}))
        row[seen] = torch.where(row[seen] > 0, row[seen] / repetition, row[seen] * repetition)
        for token in set(before):
            row[token] -= presence + frequency * before.count(token)

    return rule


def changed_logits(prompt, tokens, separator_ids):
    """Parameters of a request and what they do to the reference's logits, by name."""
    bias = {tokens[2]: -100.0, tokens[6]: 2.5, separator_ids[0]: -1.5}
    allowed = sorted({*range(0, 4096, 5), *separator_ids} - {EOS})
    word = next(decode([t]).strip() for t in tokens if decode([t])[1:].isalpha())
    pair = next(
        decode(two).strip()
        for two in map(list, pairwise(tokens))
        if encode(" " + decode(two).strip()) == two
    )
    banned = [ids for text in (word, pair) for ids in (encode(text), encode(" " + text))]
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
    return {
        "logit_bias": ({"logit_bias": bias}, add_bias(bias)),
        "allowed": ({"allowed_token_ids": allowed}, allow(allowed)),
        "bad_words": ({"bad_words": [word, pair]}, ban(banned)),
        "penalties": (penalties, penalise(prompt, *penalties.values())),
    }


def test_changed_logits(engine, intruder, plain, reference, separator_ids):
    """Requests of every kind share batches; each has another answer than the plain one."""
    prompt, tokens = plain
    cases = changed_logits(prompt, tokens, separator_ids)
    requests = {
        name: {"prompt": prompt, "max_tokens": 32, **params} for name, (params, _) in cases.items()
    }
    answers = engine.serve({"plain": {"prompt": prompt, "max_tokens": 32}, **requests}, intruder)
    assert list(answers.pop("plain").outputs[0].token_ids) == tokens
    for name, answer in answers.items():
        given = answer.outputs[0].token_ids
        assert len(given) == 32
        assert list(given) != tokens, f"{name} changed nothing"
        reference.check(prompt, given, cases[name][1])


# Structured output


NAME = "[A-Z][a-z]{2,6}"
REGEX = "[A-Z][a-z]{3,9}, [0-9]{2}(;|!)"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": f"^{NAME}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "kind": {"enum": ["dog", "cat", "horse"]},
        "tame": {"type": "boolean"},
    },
    "required": ["name", "age", "kind", "tame"],
    "additionalProperties": False,
}
# A constraint, and all the texts it allows as a regular expression.
STRUCTURED = {
    "choice": (
        {"choice": ["yes, surely", "no, never", "perhaps"]},
        "yes, surely|no, never|perhaps",
    ),
    "regex": ({"regex": REGEX}, REGEX),
    "json": (
        {"json": SCHEMA},
        rf'\{{"name":"{NAME}","age":[1-9][0-9]?,"kind":"(dog|cat|horse)","tame":(true|false)\}}',
    ),
}


def grammar(pattern):
    """Ban every token after which no text of ``pattern`` can follow."""
    special = set(tokenizer().all_special_ids)
    texts = {i: decode([i]) for i in range(4096) if i not in special}
    compiled = regex.compile(pattern)

    def rule(row, before):
        text = decode(before)
        allowed = [i for i, more in texts.items() if compiled.fullmatch(text + more, partial=True)]
        if compiled.fullmatch(text):
            allowed.append(EOS)
        allow(allowed)(row, before)

    return rule


def test_structured_output(engine, intruder, plain, reference):
    """Valid, and of the tokens a constraint allows those the reference likes best."""
    from vllm.sampling_params import StructuredOutputsParams

    prompt = plain[0]
    requests = {
        name: {
            "prompt": prompt,
            "max_tokens": 60,
            "ignore_eos": False,
            "structured_outputs": StructuredOutputsParams(**constraint),
        }
        for name, (constraint, _) in STRUCTURED.items()
    }
    for name, answer in engine.serve(requests, intruder).items():
        output, pattern = answer.outputs[0], STRUCTURED[name][1]
        assert output.finish_reason == "stop"
        assert regex.fullmatch(pattern, output.text), output.text
        reference.check(prompt, output.token_ids, grammar(pattern))
        if name == "json":
            assert json.loads(output.text).keys() == SCHEMA["properties"].keys()


# Samples


def sample(rows, seed, temperature=1.0, top_k=None, top_p=None):
    """What vLLM's sampler draws from the reference's logits.

    Its noise follows from the seed; which token wins is up to the logits.
    """
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    sampler, generator = TopKTopPSampler(), torch.Generator().manual_seed(seed)
    limits = [None if limit is None else torch.tensor([limit]) for limit in (top_k, top_p)]
    return [int(sampler(row[None] / temperature, {0: generator}, *limits)[0]) for row in rows]


def test_seeded_samples(engine, intruder, book, reference):
    """Three samples of one prompt, whose seeds count up, and a narrower one of another.

    The three find a partly filled page of the stream, and each fills the rest in its own way:
    what it wrote there is read once it is behind the window.
    """
    first, second = book[500:600], book[7000:7090]
    narrow = {"temperature": 0.7, "top_k": 40, "top_p": 0.9}
    requests = {
        "three": {"prompt": first, "max_tokens": 120, "n": 3, "seed": 7, "temperature": 1.0},
        "narrow": {"prompt": second, "seed": 11, **narrow},
    }
    engine.serve({"warm": {"prompt": first, "max_tokens": 1}})
    answers = engine.serve(requests, intruder)
    samples = [list(output.token_ids) for output in answers["three"].outputs]
    assert answers["three"].num_cached_tokens == 96
    assert len({tuple(tokens) for tokens in samples}) == 3
    for i, tokens in enumerate(samples):
        assert sample(reference.rows(first, tokens), 7 + i) == tokens
    tokens = list(answers["narrow"].outputs[0].token_ids)
    assert len(tokens) == 24
    assert sample(reference.rows(second, tokens), 11, **narrow) == tokens


def test_seeded_samples_of_prompts_in_chunks(engine, intruder, book, reference):
    """A step that computes a part of a prompt draws nothing, at first and after preemption."""
    first, second = book[1000:1590], book[3000:3310]
    drawn = {"max_tokens": 40, "temperature": 1.0}
    requests = {
        "long": {"prompt": first, "seed": 5, **drawn},
        "other": {"prompt": second, "n": 2, "seed": 9, **drawn},
    }
    answers = engine.serve(requests, intruder)
    for name, prompt, seed in (("long", first, 5), ("other", second, 9)):
        for i, output in enumerate(answers[name].outputs):
            tokens = list(output.token_ids)
            assert sample(reference.rows(prompt, tokens), seed + i) == tokens


def test_samples_share_the_pages_of_their_prompt(engine, book, separator_ids, reference):
    """A prompt of two chunks, cold: the first sample computes it, the others wait and find it."""
    prompt, chunk = book[1000:1700], SMALL_POOL["max_num_batched_tokens"]
    engine.add("r", prompt, max_tokens=12, n=3, temperature=1.0, logprobs=0)
    for _ in range(3):
        engine.step()
    children = list(engine.scheduler.requests.values())
    assert len(children) == 3
    computed = sum(child.num_computed_tokens for child in children)
    assert computed == 3 * len(prompt) + 1 > 3 * chunk, "more than three steps can compute"
    kept = 4 + sum(token in separator_ids for token in prompt[4:672])
    shared = [block for block in engine.pool.blocks if block.ref_cnt == 3]
    assert len(shared) >= kept // 32 > 0
    outputs = []
    while not outputs:
        outputs = engine.step()
        engine.check_integrity()
    samples = outputs[0].outputs
    assert len({tuple(sample.token_ids) for sample in samples}) == 3
    for drawn in samples:
        entries = dict(enumerate(drawn.logprobs, len(prompt)))
        reference.check_log_probs([*prompt, *drawn.token_ids], entries)


# Beam search


def beam_search(reference, prompt, width, max_tokens):
    """The best beams, by total log-probability over length, best first."""
    beams, ended = [((), 0.0)], []

    def score(beam):
        tokens, total = beam
        return total / (len(prompt) + len(tokens) - (tokens[-1] == EOS))

    for _ in range(max_tokens):
        grown = []
        for tokens, total in beams:
            best = reference.logits([*prompt, *tokens])[-1].log_softmax(-1).topk(2 * width)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                place = ended if token == EOS else grown
                place.append(((*tokens, token), total + value))
        beams = sorted(grown, key=score, reverse=True)[:width]
    return [tokens for tokens, _ in sorted(ended + beams, key=score, reverse=True)[:width]]


@pytest.mark.parametrize("width", [2, 3])
def test_beam_search(engine, book, reference, width):
    """Two prompts at once; with every token beams part and find the pages they share."""
    from vllm.sampling_params import BeamSearchParams

    prompts = [book[200:290], book[8000:8160]]
    found = engine.llm.beam_search(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        BeamSearchParams(beam_width=width, max_tokens=5),
    )
    for prompt, output in zip(prompts, found, strict=True):
        beams = [tuple(beam.tokens[len(prompt) :]) for beam in output.sequences]
        assert beams == beam_search(reference, prompt, width, 5)
