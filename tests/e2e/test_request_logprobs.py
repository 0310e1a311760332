"""Log-probabilities are those of the reference: of samples and prompts, cached or preempted."""

import pytest

pytestmark = pytest.mark.e2e


def of_prompt(answer):
    """Log-probabilities of a prompt by position; the first token has none."""
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
    assert answer.prompt_logprobs[0] is None
    return dict(enumerate(answer.prompt_logprobs[1:], 1))


def sequence(answer):
    return [*answer.prompt_token_ids, *answer.outputs[0].token_ids]


def test_samples_and_prompts(engine, intruder, book, reference):
    """The five best of every generated token, and the three best of every prompt token."""
    asked = {"logprobs": 5, "prompt_logprobs": 3, "max_tokens": 10}
    requests = {
        "long": {"prompt": book[:700], **asked},
        "short": {"prompt": book[4000:4090], **asked},
    }
    for answer in engine.serve(requests, intruder).values():
        ids, output = sequence(answer), answer.outputs[0]
        reference.check(answer.prompt_token_ids, output.token_ids)
        reference.check_log_probs(ids, of_prompt(answer), top=3)
        first = len(answer.prompt_token_ids)
        reference.check_log_probs(ids, dict(enumerate(output.logprobs, first)), top=5)


def test_cached_prompt(engine, book, reference):
    """Every token of it is computed again: the cache is not read, and others still find it."""
    prompt = book[2000:2600]
    engine.serve({"cold": {"prompt": prompt}})
    asked = {"prompt": prompt, "prompt_logprobs": 1, "max_tokens": 4}
    answers = engine.serve({"asked": asked, "warm": {"prompt": prompt, "max_tokens": 4}})
    assert answers["asked"].num_cached_tokens == 0
    assert answers["warm"].num_cached_tokens == 576
    for answer in answers.values():
        reference.check(prompt, answer.outputs[0].token_ids)
    reference.check_log_probs(sequence(answers["asked"]), of_prompt(answers["asked"]), top=1)


def test_preempted_between_two_chunks_of_the_prompt(engine, book, reference):
    engine.add("r", book[2000:3100], max_tokens=2, prompt_logprobs=2)
    engine.step()
    [request] = engine.scheduler.requests.values()
    assert 0 < request.num_computed_tokens < request.num_prompt_tokens
    assert engine.llm.reset_prefix_cache(reset_running_requests=True)
    assert request.num_preemptions == 1
    assert request.num_computed_tokens == 0
    engine.check_integrity()
    outputs = []
    while not outputs:
        outputs = engine.step()
        engine.check_integrity()
    reference.check_log_probs(sequence(outputs[0]), of_prompt(outputs[0]), top=2)


def test_the_comparison_can_fail(engine, book, reference):
    """Log-probabilities of one token's difference in the context do not pass."""
    [answer] = engine.generate([book[:700]], max_tokens=1, prompt_logprobs=0)
    ids = sequence(answer)
    reference.check_log_probs(ids, of_prompt(answer))
    with pytest.raises(AssertionError, match="another log-probability"):
        reference.check_log_probs([ids[4], *ids[1:]], of_prompt(answer))
