"""Nothing waits for ever: pools of just the size that a request needs.

What an empty pool serves is served whatever else was there before, and with the same answer: a
prefix that is found never costs a request the page it lacks. What cannot be served ends with its
reason, and what comes behind it is served.
"""

import re
from collections import Counter

import pytest
from helpers import find_separators
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from simulation import Simulation
from test_scheduling import WORDS, answer, next_token, ngram, propose
from vllm.v1.core.sched.interface import PauseState

from vllm_sepllm.engine.scheduling.spec import KeptSpec

pytestmark = pytest.mark.engine

SEPARATORS = find_separators()[:2]
AMPLE = 1500
SINKS = 4
MOST_TOKENS = 60


@st.composite
def cases(draw):
    """Options of a simulation, a prompt, and what was there before it."""
    num_groups = draw(st.sampled_from([1, 1, 1, 2, 5]))
    sepllm = {
        "window_size": draw(st.sampled_from([1, 3, 16, 40, 64])),
        "num_sink_tokens": draw(st.sampled_from([0, 2, SINKS, 20])),
        "max_separator_tokens": draw(st.sampled_from([None, None, None, 1, 5, 30])),
        "separator_token_ids": list(SEPARATORS),
    }
    if num_groups == 1:
        sepllm["position_mode"] = draw(st.sampled_from(["original", "original", "cache"]))
    options = {
        "num_layers": num_groups,
        "num_dense": int(num_groups > 1),
        "block_size": draw(st.sampled_from([16, 32])),
        "max_num_batched_tokens": draw(st.sampled_from([16, 64, 64, 400])),
        "enable_prefix_caching": draw(st.sampled_from([True, True, True, False])),
        "scheduler_reserve_full_isl": draw(st.booleans()),
        "scheduling_policy": draw(st.sampled_from(["fcfs", "priority"])),
        "long_prefill_token_threshold": draw(st.sampled_from([0, 0, 13])),
    }
    every = draw(st.sampled_from([1, 2, 5, 1000]))  # one in so many tokens is a separator
    length = draw(st.integers(1, 380))
    prompt = [SEPARATORS[0] if i % every == 0 else WORDS[i * i % 9] for i in range(length)]
    before = [(draw(st.integers(1, length)), draw(st.integers(1, 40))) for _ in range(2)]
    settles = draw(st.booleans())
    beyond = draw(st.sampled_from([-1, 0, 0, 0, 0, 1])) * draw(st.sampled_from([1, num_groups]))
    return sepllm, options, prompt, draw(st.integers(1, MOST_TOKENS)), before, settles, beyond


class Run:
    """One pool: what was there before, the request, and one that comes behind it."""

    def __init__(self, case, num_blocks, asynchronous, drafts):
        sepllm, options, self.prompt, self.max_tokens, self.before, *_ = case
        self.simulation = Simulation(
            sepllm,
            next_token,
            num_blocks=num_blocks,
            max_model_len=len(self.prompt) + MOST_TOKENS,
            asynchronous=asynchronous,
            propose=propose if drafts else None,
            **ngram(drafts),
            **options,
        )
        self.most = self.preemptions = 0

    def prepare(self, settles):
        """Ask for prefixes of the prompt, each continued in its own way, and perhaps wait."""
        for i, (length, max_tokens) in enumerate(self.before):
            self.simulation.add(f"before{i}", self.prompt[:length], max_tokens, priority=i)
            if settles:
                self.settle()

    def serve(self):
        """How the request ended; all answers are checked."""
        simulation, asked = self.simulation, {}
        asked["it"] = simulation.add("it", self.prompt, self.max_tokens, priority=1)
        asked["behind"] = simulation.add("behind", [WORDS[0]], 2, priority=2)
        asked |= {name: simulation.scheduler.requests[name] for name in simulation.live}
        self.settle()
        self.preemptions = sum(request.num_preemptions for request in asked.values())
        for name, request in asked.items():
            if simulation.finished[name] == "length":
                prompt = request.prompt_token_ids
                assert simulation.answers[name] == answer(prompt, request.max_tokens)
            else:
                assert simulation.finished[name] == "error"
        assert simulation.finished["behind"] == "length"
        return simulation.finished["it"]

    def settle(self):
        simulation = self.simulation
        while simulation.scheduler.has_unfinished_requests():
            simulation.step()
            simulation.check()
            self.most = max(self.most, simulation.num_held)
        simulation.settle()
        assert simulation.num_held == 0


@pytest.mark.parametrize(("asynchronous", "drafts"), [(False, False), (True, True)])
def test_what_an_empty_pool_serves_is_served(asynchronous, drafts):
    seen = Counter()

    @settings(
        max_examples=100,
        phases=[Phase.explicit, Phase.generate],
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case):
        ample = Run(case, AMPLE, asynchronous, drafts)
        ample.simulation.add("it", ample.prompt, ample.max_tokens)
        ample.settle()
        least = 2 * case[1]["num_layers"] + case[1]["num_dense"]  # what the one behind it needs
        num_blocks = 1 + max(least, ample.most + case[-1])
        try:
            cold = Run(case, num_blocks, asynchronous, drafts)
        except ValueError as error:
            if "To serve at least one request" not in str(error):
                raise
            reject()  # too few by vLLM's check at start-up
        served_cold = cold.serve()
        warm = Run(case, num_blocks, asynchronous, drafts)
        warm.prepare(settles=case[-2])
        served_warm = warm.serve()
        if served_cold == "length":
            assert served_warm == "length"
        seen[served_cold] += 1
        seen["hits"] += warm.simulation.cached.get("it", 0) > 0
        seen["preemptions"] += cold.preemptions + warm.preemptions

    run()
    assert all(seen[kind] > 5 for kind in ("length", "error", "hits", "preemptions")), seen


def fitting_prompt(simulation, length):
    """A prompt of which the pool holds exactly the pages it needs."""
    simulation.add("probe", [WORDS[0]] * length, 1)
    least = simulation.scheduler._admission.pages_needed("probe", length, 512)
    simulation.abort("probe")
    groups = len(simulation.groups[KeptSpec])
    missing, rest = divmod(simulation.pool.num_gpu_blocks - 1 - least, groups)
    assert rest == 0
    separators = (missing + 1) * simulation.block_size - SINKS  # the sinks take a page of words
    return (
        [WORDS[0]] * SINKS
        + [SEPARATORS[0]] * separators
        + [WORDS[1]] * (length - SINKS - separators)
    )


@pytest.mark.parametrize(("num_groups", "num_blocks"), [(1, 66), (5, 396), (5, 401)])
@pytest.mark.parametrize("cached", [60, 64, 100, 500, 1890])
def test_a_prefix_that_is_found_costs_no_page_that_is_missing(num_groups, num_blocks, cached):
    simulation = Simulation(
        {
            "window_size": 64,
            "num_sink_tokens": SINKS,
            "separator_token_ids": list(SEPARATORS),
        },
        next_token,
        num_blocks=num_blocks,
        num_layers=num_groups,
        num_dense=int(num_groups > 1),
        block_size=32,
        max_model_len=2048,
        max_num_batched_tokens=512,
    )
    prompt = fitting_prompt(simulation, 1900)
    simulation.add("first", prompt[:cached], 1)
    simulation.settle()
    simulation.add("it", prompt, 1)
    assert simulation.scheduler._admission.pages_needed("it", 1900, 512) == num_blocks - 1
    simulation.add("behind", [WORDS[0]] * 40, 3)
    simulation.settle()
    simulation.check()
    assert set(simulation.finished.values()) == {"length"}
    assert simulation.answers["it"] == answer(prompt, 1)
    assert simulation.answers["behind"] == answer([WORDS[0]] * 40, 3)
    assert simulation.num_held == 0


def test_a_prompt_is_not_cut_where_that_is_switched_off():
    """It fits in small chunks only, so it is refused at once, with the pages of a whole one."""
    simulation = Simulation(
        {"window_size": 64, "num_sink_tokens": SINKS, "separator_token_ids": list(SEPARATORS)},
        next_token,
        num_blocks=66,
        block_size=32,
        max_model_len=2048,
        max_num_batched_tokens=2048,
        enable_chunked_prefill=False,
    )
    simulation.add("it", [SEPARATORS[0]] * 1100, 1)
    assert simulation.scheduler._refused
    simulation.add("behind", [WORDS[0]] * 40, 3)
    simulation.settle()
    assert simulation.finished == {"it": "error", "behind": "length"}
    [needed] = re.findall(r"need (\d+) KV cache blocks", simulation.reasons["it"])
    assert int(needed) > 65


def small_simulation(**options):
    """Of 39 pages."""
    return Simulation(
        {"window_size": 16, "separator_token_ids": list(SEPARATORS)},
        next_token,
        num_blocks=40,
        block_size=16,
        max_model_len=600,
        max_num_batched_tokens=64,
        **options,
    )


@pytest.mark.parametrize("drafts", [3, 16])
@pytest.mark.parametrize("caching", [True, False])
def test_a_lone_request_makes_room_for_drafts_once(drafts, caching):
    """Drafts count as kept. Where the pool has no page for them it goes on without, and is not
    computed again for each token of its answer."""
    prompt, num_tokens = [SEPARATORS[0]] * 400, 60

    def outcome(num_blocks):
        simulation = Simulation(
            {"window_size": 16, "separator_token_ids": list(SEPARATORS)},
            next_token,
            num_blocks=num_blocks,
            block_size=16,
            max_model_len=512,
            enable_prefix_caching=caching,
            propose=lambda name, tokens: [WORDS[0]] * drafts,
            speculative_config={
                "method": "ngram",
                "prompt_lookup_max": 2,
                "prompt_lookup_min": 1,
                "num_speculative_tokens": drafts,
            },
        )
        request = simulation.add("it", prompt, num_tokens)
        simulation.add("behind", [WORDS[0]] * 40, 3)
        simulation.settle()
        assert simulation.finished["behind"] == "length"
        return simulation, request

    found = (outcome(num_blocks) for num_blocks in range(25, 60))
    simulation, request = next(each for each in found if each[0].finished["it"] == "length")
    assert simulation.answers["it"] == answer(prompt, num_tokens)
    assert request.num_preemptions <= 2


def test_a_reset_takes_drafts_from_nobody():
    """It preempts all that run, and memory is not short."""
    simulation = Simulation(
        {"window_size": 16, "separator_token_ids": list(SEPARATORS)},
        next_token,
        num_blocks=200,
        block_size=16,
        propose=propose,
        **ngram(True),
    )
    for i in range(3):
        simulation.add(f"r{i}", WORDS[i:8] * 9, 12)
    for _ in range(3):
        simulation.step()
    simulation.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not simulation.scheduler._undrafted
    simulation.settle()
    assert set(simulation.finished.values()) == {"length"}


def test_what_waits_for_something_else_is_not_refused():
    """Only memory is counted here. Whatever else vLLM lets a request wait for, it is served after
    that, and nobody says that it does not fit."""
    simulation = small_simulation()
    simulation._check_progress = lambda *_: None
    waiting = [True] * 8
    pending = simulation.scheduler._ec_transfer_pending
    simulation.scheduler._ec_transfer_pending = lambda *given: (
        waiting.pop() if waiting else pending(*given)
    )
    simulation.add("it", WORDS[:5] * 6, 3)
    simulation.settle()
    assert not waiting
    assert simulation.finished == {"it": "length"}


def test_a_request_waits_for_the_pages_of_a_session():
    """A session that waits for its user keeps its pages; nothing ends, and both are served."""
    simulation = small_simulation()
    first, other = [SEPARATORS[0]] * 200, [SEPARATORS[1]] * 450
    simulation.add("session", first, 1, resumable=True)
    for _ in range(10):
        simulation.step()
    simulation.add("other", other, 2)
    for _ in range(10):
        simulation.step()
        simulation.check()
    assert simulation.live == ["session", "other"]
    simulation.turn("session", None, 1)
    simulation.settle()
    assert simulation.finished["other"] == "length"
    assert simulation.answers["other"] == answer(other, 2)
    assert simulation.num_held == 0


@pytest.mark.parametrize("num_others", [0, 3])
def test_sessions_do_not_wait_for_each_others_pages(num_others):
    """Each holds a part of the pool and needs more than is left. Others wait for a row."""
    simulation = small_simulation(max_num_seqs=2)
    first = {name: [separator] * 200 for name, separator in zip("ab", SEPARATORS, strict=True)}
    more = [SEPARATORS[1]] * 250
    for name, prompt in first.items():
        simulation.add(name, prompt, 1, resumable=True)
    for _ in range(20):
        simulation.step()
    assert all(len(simulation.answers[name]) == 1 for name in first)
    for name in first:
        simulation.turn(name, more, 1)
        simulation.turn(name, None, 1)
    for number in range(num_others):
        simulation.add(f"other{number}", WORDS[:20], 9)
    for _ in range(90):
        if simulation.live:
            simulation.step()
            simulation.check()
    for name, prompt in first.items():
        # The last token of a turn is dropped when the next one comes.
        assert simulation.answers[name] == answer(prompt, 1) + answer(prompt + more, 1)
    assert not simulation.live
    assert simulation.num_held == 0


def test_a_pause_ends_although_sessions_wait_for_each_others_pages():
    """``sleep(mode="wait")`` lets those that hold pages end, and starts nobody else."""
    simulation = small_simulation()
    for name, separator in zip("ab", SEPARATORS, strict=True):
        simulation.add(name, [separator] * 200, 1, resumable=True)
    for _ in range(20):
        simulation.step()
    simulation.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for name in "ab":
        simulation.turn(name, [SEPARATORS[1]] * 250, 1)
        simulation.turn(name, None, 1)
    for _ in range(60):
        if simulation.scheduler.has_unfinished_requests():
            simulation.step()
            simulation.check()
    assert not simulation.scheduler.has_unfinished_requests()
    simulation.scheduler.set_pause_state(PauseState.UNPAUSED)
    for _ in range(60):
        if simulation.live:
            simulation.step()
            simulation.check()
    assert not simulation.live
    assert simulation.num_held == 0


@pytest.mark.parametrize(("num_dense", "num_blocks", "length"), [(0, 12, 96), (1, 25, 80)])
def test_a_step_that_never_ran_leaves_nothing_to_be_found(num_dense, num_blocks, length):
    """A request is preempted by one of higher priority in the step that it was scheduled for. Pages
    of window and dense layers were noted in the prefix cache before, and are not computed. Kept
    pages, which are noted later, do not hide that where nothing is kept."""
    simulation = Simulation(
        {"window_size": 16, "num_sink_tokens": 0, "separator_token_ids": list(SEPARATORS)},
        next_token,
        num_blocks=num_blocks,
        num_dense=num_dense,
        block_size=16,
        max_model_len=176,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=32,
        scheduler_reserve_full_isl=False,
        scheduling_policy="priority",
    )
    low, high = [WORDS[0]] * 160, [SEPARATORS[0]] * length
    simulation.add("low", low, 1, priority=5)
    simulation.step()
    simulation.add("high", high, 1, priority=0)
    while simulation.live:
        simulation.step()
        simulation.check()
    assert simulation.answers["low"] == answer(low, 1)
    assert simulation.answers["high"] == answer(high, 1)
