"""Prompts that begin alike and come together: computed once and held once, as with full attention.

Pages of the stream are found from the next step on, so a request waits for it.
"""

import pytest
from simulation import Simulation
from test_scheduling import SEPARATORS, WORDS, answer, next_token

from vllm_sepllm.engine.scheduling.sharing import MOST_PASSED_OVER

pytestmark = pytest.mark.engine

PROMPT = [SEPARATORS[0] if i % 6 == 5 else WORDS[i * i % 9] for i in range(200)]
COUNT = 6
OPTIONS = {"num_blocks": 300, "max_num_batched_tokens": 2048, "block_size": 16}


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def simulate(request):
    def make(bound=None, **options):
        sepllm = {"separator_token_ids": list(SEPARATORS), "window_size": 32}
        sepllm["max_separator_tokens"] = bound
        asynchronous = request.param
        return Simulation(sepllm, next_token, asynchronous=asynchronous, **OPTIONS | options)

    return make


def together(simulation, prompts, **options):
    """Answers to prompts that are there before the first step, checked; pages held at most."""
    for i, prompt in enumerate(prompts):
        simulation.add(f"r{i}", prompt, 8, **options)
    most = 0
    while simulation.scheduler.has_unfinished_requests():
        simulation.step()
        simulation.check()
        most = max(most, simulation.num_held)
    simulation.settle()
    for i, prompt in enumerate(prompts):
        assert simulation.answers[f"r{i}"] == answer(prompt, 8)
    assert simulation.num_held == 0
    return most


def test_equal_prompts_are_computed_once(simulate):
    alone, all_of_them = simulate(), simulate()
    one = together(alone, [PROMPT])
    most = together(all_of_them, [PROMPT] * COUNT)
    assert [all_of_them.cached[f"r{i}"] for i in range(COUNT)] == [0] + [192] * (COUNT - 1)
    # Each of the others has a copy of the stream's last page and pages of its own at the end.
    assert most <= one + (COUNT - 1) * 4
    assert COUNT * one > 2 * most


def test_what_they_have_in_common_is_computed_once(simulate):
    simulation = simulate()
    together(simulation, [PROMPT[:128] + [word] * 40 for word in WORDS[:COUNT]])
    assert sorted(simulation.cached.values()) == [0] + [128] * (COUNT - 1)


def test_others_do_not_wait(simulate):
    simulation = simulate()
    for i in range(COUNT):
        simulation.add(f"r{i}", [WORDS[i], *PROMPT], 8)
    # Only the first block of these is new, and their last token is in it.
    for i in range(2):
        simulation.add(f"short{i}", PROMPT[:16], 8)
    simulation.step()
    assert len(simulation.scheduler.running) == COUNT + 2
    simulation.settle()


def first_steps(simulation, names, max_steps=400):
    """The step in which each request is first computed."""
    found = {}
    for step in range(1, max_steps):
        before = {name: simulation.scheduler.requests[name].num_computed_tokens for name in names}
        simulation.step()
        for name in names:
            request = simulation.scheduler.requests.get(name)
            if request is None or request.num_computed_tokens > before[name]:
                found.setdefault(name, step)
        names = [name for name in names if name not in found]
        if not names:
            return found
    raise AssertionError(f"{names} never started")


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_nobody_takes_the_turn_of_those_that_wait(simulate, policy):
    """Rows are few, and those behind have long answers."""
    simulation = simulate(max_num_seqs=8, scheduling_policy=policy)
    equal = [f"r{i}" for i in range(4)]
    for name in equal:
        simulation.add(name, PROMPT, 4, priority=0)
    for i in range(12):
        simulation.add(f"other{i}", [WORDS[i % 9]] * (20 + i), 50, priority=1)
    found = first_steps(simulation, equal)
    assert [found[name] for name in equal] == [1, 2, 2, 2]
    simulation.settle()
    assert set(simulation.finished.values()) == {"length"}


@pytest.mark.parametrize("num_equal", [len(PROMPT) * 2, 150])
@pytest.mark.parametrize("num_blocks", [60, 90, 140])
def test_nobody_takes_the_pages_of_those_that_wait(simulate, num_blocks, num_equal):
    """The first one's prompt takes several steps, in which there is room for others."""
    simulation = simulate(num_blocks=num_blocks, max_num_seqs=40, long_prefill_token_threshold=64)
    equal = [f"r{i}" for i in range(4)]
    for name in equal:
        tail = [WORDS[int(name[1:])]] * (len(PROMPT) * 2 - num_equal)
        simulation.add(name, (PROMPT * 2)[:num_equal] + tail, 4)
    for i in range(30):
        simulation.add(f"other{i}", [WORDS[i % 9]] * (20 + i), 50)
    found = first_steps(simulation, equal)
    assert max(found.values()) <= 1 + -(-len(PROMPT * 2) // 64)
    simulation.settle()
    assert set(simulation.finished.values()) == {"length"}


@pytest.mark.parametrize("bound", [1, 4])
def test_nobody_waits_for_what_it_cannot_find(simulate, bound):
    """With a bound few places can be resumed at. A request waits no longer than it finds more."""
    simulation = simulate(bound, long_prefill_token_threshold=48)
    waited = []
    pending = simulation.scheduler._ec_transfer_pending

    def count(request, num_computed_tokens):
        waits = pending(request, num_computed_tokens)
        if waits:
            waited.append((request.request_id, num_computed_tokens))
        return waits

    simulation.scheduler._ec_transfer_pending = count
    together(simulation, [PROMPT] * COUNT)
    assert waited
    assert len(waited) == len(set(waited))
    for name in {name for name, _ in waited}:
        found = [num_tokens for other, num_tokens in waited if other == name]
        assert found == sorted(found)
    assert not simulation.scheduler._waited


def test_a_request_that_reads_no_prefix_does_not_wait(simulate):
    simulation = simulate()
    simulation.add("r0", PROMPT, 8)
    simulation.add("r1", PROMPT, 8).skip_reading_prefix_cache = True
    simulation.step()
    assert len(simulation.scheduler.running) == 2
    simulation.settle()
    assert simulation.cached == {"r0": 0, "r1": 0}


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_nobody_takes_the_tokens_of_those_that_wait(simulate, policy):
    """A prompt of many steps behind them would leave them none until it is computed."""
    simulation = simulate(max_num_batched_tokens=256, max_model_len=2048, scheduling_policy=policy)
    equal = ["r0", "r1"]
    for name in equal:
        simulation.add(name, PROMPT, 4, priority=0)
    simulation.add("long", [WORDS[i % 7] for i in range(1900)], 4, priority=1)
    found = first_steps(simulation, [*equal, "long"])
    assert found == {"r0": 1, "r1": 2, "long": 2}
    simulation.settle()


def test_they_wait_again_after_a_reset(simulate):
    """What they had found when they waited first is gone."""
    simulation = simulate()
    for i in range(COUNT):
        simulation.add(f"r{i}", PROMPT, 40)
    for _ in range(8):
        simulation.step()
    assert len(simulation.scheduler.running) == COUNT
    assert simulation.scheduler.reset_prefix_cache(reset_running_requests=True)
    simulation.step()
    assert len(simulation.scheduler.running) == 1
    simulation.settle()
    for i in range(COUNT):
        assert simulation.answers[f"r{i}"] == answer(PROMPT, 40)


def test_equal_prompts_that_wait_are_searched_for_once(simulate, monkeypatch):
    simulation = simulate(long_prefill_token_threshold=64)
    for i in range(COUNT):
        simulation.add(f"r{i}", PROMPT, 8)
    searched = []
    manager = simulation.scheduler.kv_cache_manager
    search = manager.get_computed_blocks
    monkeypatch.setattr(
        manager, "get_computed_blocks", lambda request: searched.append(request) or search(request)
    )
    simulation.step()
    assert [request.request_id for request in searched] == ["r0", "r1"]
    simulation.settle()
    assert all(simulation.answers[f"r{i}"] == answer(PROMPT, 8) for i in range(COUNT))


def test_those_behind_get_the_rest_of_the_step(simulate):
    """Pairs of prompts that take more than half a step: none of its tokens is left over."""
    simulation = simulate(max_num_batched_tokens=256)
    for i in range(4):
        for side in "ab":
            simulation.add(f"{side}{i}", [WORDS[i], *PROMPT[:170]], 4)
    simulation.step()
    requests = simulation.scheduler.requests
    found = {name: requests[name].num_computed_tokens for name in requests}
    assert found["a0"] == 171
    assert found["b0"] == 0
    assert found["a1"] == 256 - 171
    simulation.settle()


def test_short_ones_need_nothing_of_the_next_step(simulate):
    """What was passed over starts in the end, and takes more than those behind may. A short prompt
    behind it takes no more."""
    simulation = simulate(
        num_blocks=2000,
        max_num_batched_tokens=330,
        max_model_len=2048,
        long_prefill_token_threshold=100,
    )
    for name, first in (("computed", 0), ("waits", 0), ("behind", 1), ("passed over", 2)):
        simulation.add(name, [WORDS[first], *PROMPT * 9], 4)
    found = first_steps(simulation, ["computed", "behind", "passed over"])
    assert found == {"computed": 1, "behind": 1, "passed over": MOST_PASSED_OVER + 1}
    simulation.add("short", [WORDS[8]] * 20, 4)
    assert first_steps(simulation, ["short"]) == {"short": 1}
    assert not simulation.scheduler.requests["waits"].num_computed_tokens
    simulation.settle()


def test_nobody_is_passed_over_for_ever(simulate):
    """Pairs of a higher priority come in every step, and somebody waits in each."""
    simulation = simulate(
        max_num_batched_tokens=256, max_model_len=2048, scheduling_policy="priority"
    )
    simulation.add("long", [WORDS[i % 7] for i in range(1900)], 4, priority=1)
    for step in range(MOST_PASSED_OVER + 1):
        assert not simulation.scheduler.requests["long"].num_computed_tokens
        for side in "ab":
            prompt = [WORDS[step % 9], WORDS[step // 9], *PROMPT[:90]]
            simulation.add(f"{side}{step}", prompt, 1, priority=0)
        simulation.step()
    assert simulation.scheduler.requests["long"].num_computed_tokens
    simulation.settle()
