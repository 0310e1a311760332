"""Requests that are aborted, overtaken, put to sleep or computed again; the others never notice."""

import pytest
from helpers import MODEL, POOL_FILLING_TOKENS

pytestmark = pytest.mark.e2e


def outside_name(request):
    """The name a request was added under; vLLM appends something of its own."""
    return request.request_id.rsplit("-", 1)[0]


def finish(engine, after_step=lambda: None):
    """Run until nothing is left; the answers in the order they came."""
    answers = {}
    while engine.llm.llm_engine.has_unfinished_requests():
        answers.update({output.request_id: output for output in engine.step()})
        engine.check_integrity()
        after_step()
    return answers


def check_all(reference, prompts, answers, max_tokens):
    for name, answer in answers.items():
        tokens = list(answer.outputs[0].token_ids)
        assert len(tokens) == max_tokens
        reference.check(prompts[name], tokens)


def phase(request):
    """What an abort would interrupt."""
    if request.num_preemptions and not request.num_computed_tokens:
        return "preempted"
    if not request.num_computed_tokens:
        return "waiting"
    if request.num_computed_tokens < request.num_prompt_tokens:
        return "prefilling"
    return "decoding"


def test_aborts_in_every_phase(engine, book, separator_ids, reference):
    """Requests that share a beginning: what one gives back, the others still hold."""
    prompts = {f"r{i}": book[:300] + book[i * 400 : i * 400 + 300] for i in range(12)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, max_tokens=40, priority=1)
    aborted = {}

    def abort():
        live = [r for r in engine.scheduler.requests.values() if outside_name(r) in prompts]
        if len(aborted) == 3 and not engine.scheduler.waiting:
            engine.add("intruder", [separator_ids[0]] * POOL_FILLING_TOKENS, max_tokens=1)
            aborted["intruder"] = None
        for request in live:
            if phase(request) not in aborted:
                aborted[phase(request)] = outside_name(request)
                engine.abort([outside_name(request)])
                engine.check_integrity()
                return

    answers = finish(engine, abort)
    assert aborted.keys() == {"waiting", "prefilling", "decoding", "intruder", "preempted"}
    assert answers.pop("intruder").outputs[0].finish_reason == "length"
    assert answers.keys() == prompts.keys() - set(aborted.values())
    check_all(reference, prompts, answers, 40)


def test_aborted_samples(engine, book, reference):
    """All samples of one request end at once; another request with its prompt goes on."""
    engine.add("other", book[:200])
    engine.add("three", book[:200], n=3, temperature=1.0)
    for _ in range(5):
        assert not engine.step()
    assert len(engine.scheduler.requests) == 4
    engine.abort(["three"])
    engine.check_integrity()
    assert len(engine.scheduler.requests) == 1
    answers = finish(engine)
    assert answers.keys() == {"other"}
    check_all(reference, {"other": book[:200]}, answers, 24)


def test_urgent_requests_overtake(engine, book, reference):
    """One that comes last is served before those that wait, if they are less urgent."""
    prompts = {f"r{i}": book[i * 300 : i * 300 + 100] for i in range(12)}
    urgent = prompts.popitem()
    for name, prompt in prompts.items():
        engine.add(name, prompt, priority=5)
    for _ in range(2):
        assert not engine.step()
    waiting = {outside_name(request) for request in engine.scheduler.waiting}
    assert len(waiting) == 3
    engine.add(*urgent, priority=0)
    answers = finish(engine)
    order = list(answers)
    assert order.index(urgent[0]) < min(order.index(name) for name in waiting)
    check_all(reference, dict([*prompts.items(), urgent]), answers, 24)


def test_the_least_urgent_are_preempted(engine, book, separator_ids, reference):
    """Again and again, until the urgent ones, which are not disturbed, leave enough memory."""
    prompts = {f"r{i}": book[i * 500 : i * 500 + 250] for i in range(4)}
    for i, (name, prompt) in enumerate(prompts.items()):
        engine.add(name, prompt, max_tokens=40, priority=2 * (i % 2))
    for _ in range(2):
        assert not engine.step()
    engine.add("intruder", [separator_ids[0]] * POOL_FILLING_TOKENS, max_tokens=1, priority=1)
    preempted = set()

    def note():
        live = engine.scheduler.requests.values()
        preempted.update(outside_name(request) for request in live if request.num_preemptions)

    answers = finish(engine, note)
    assert preempted == {"r1", "r3", "intruder"}
    assert list(answers)[:3] == ["r0", "r2", "intruder"]
    del answers["intruder"]
    check_all(reference, prompts, answers, 40)


def test_generate_with_priorities(engine, book, reference):
    from vllm import SamplingParams

    prompts = [book[i * 700 : i * 700 + 650] for i in range(10)]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    answers = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        params,
        priority=[i % 3 for i in range(10)],
        use_tqdm=False,
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        reference.check(prompt, list(answer.outputs[0].token_ids))


def test_reset_of_the_prefix_cache_while_requests_run(engine, book, reference):
    """Refused as long as pages are held; if asked to, all requests are computed again."""
    prompts = {f"r{i}": book[i * 500 : i * 500 + 300] for i in range(4)}
    for name, prompt in prompts.items():
        engine.add(name, prompt)
    for _ in range(6):
        assert not engine.step()
    assert not engine.llm.reset_prefix_cache()
    engine.check_integrity()
    requests = list(engine.scheduler.requests.values())
    assert engine.llm.reset_prefix_cache(reset_running_requests=True)
    assert [request.num_preemptions for request in requests] == [1] * 4
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
    answers = finish(engine)
    assert answers.keys() == prompts.keys()
    check_all(reference, prompts, answers, 24)


@pytest.mark.parametrize("level", [0, 1])
def test_sleep_keeps_requests(engine, book, reference, level):
    """Nothing is computed until the engine is woken; level 1 forgets the KV cache."""
    prompts = {f"r{i}": book[i * 500 : i * 500 + 300] for i in range(3)}
    for name, prompt in prompts.items():
        engine.add(name, prompt)
    for _ in range(6):
        assert not engine.step()
    requests = list(engine.scheduler.requests.values())
    before = [request.num_tokens for request in requests]
    engine.llm.sleep(level, mode="keep")
    for _ in range(3):
        assert not engine.step()
        engine.check_integrity()
    assert [request.num_tokens for request in requests] == before
    assert [request.num_preemptions for request in requests] == [level] * 3
    assert engine.llm.wake_up()
    answers = finish(engine)
    assert answers.keys() == prompts.keys()
    check_all(reference, prompts, answers, 24)


def test_sleep_aborts_requests(engine, book, reference):
    engine.add("r", book[:300])
    for _ in range(6):
        assert not engine.step()
    engine.llm.sleep(1)
    engine.abort(["r"])  # what vLLM's front end remembers of it
    engine.check_empty()
    assert engine.llm.wake_up()
    answers = engine.generate([book[:300]] * 2, 8)
    # The second one waits for the first, and finds it.
    assert [answer.num_cached_tokens for answer in answers] == [0, 288]
    for answer in answers:
        reference.check(book[:300], list(answer.outputs[0].token_ids))


@pytest.mark.parametrize("options", [{}, {"attention_backend": "sepllm"}])
def test_sleep_mode_is_refused_by_vllm_on_cpu(options):
    from vllm import EngineArgs

    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        EngineArgs(MODEL, enable_sleep_mode=True, **options).create_engine_config()
