"""Scheduler, managers and a model of the worker together, over random traffic.

Whatever arrives, aborts, preempts, drafts or shares a prefix: every query reads exactly the
tokens of its own prefix, answers depend on the prompt alone, no request holds a page too few or
for nothing, and all pages come back (``tools/simulation.py``).
"""

import itertools
from collections import Counter

import pytest
from helpers import find_separators
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulation import Simulation, identity

pytestmark = pytest.mark.engine

SEPARATORS = find_separators()[:2]
WORDS = [token for token in range(100, 110) if token not in SEPARATORS]
DRAFTS = 3
KEPT = [
    {"separator_token_ids": list(SEPARATORS)},
    {
        "keep": list(SEPARATORS),
        "keep_after": [[3, [SEPARATORS[0]]], [1, [SEPARATORS[1]]]],
        "segment_ends": WORDS[:3],
    },
    {"keep": list(SEPARATORS), "keep_after": [[9, [SEPARATORS[0]]]], "segment_ends": []},
]
STEMS = [
    [((i * 7 + stem * 3) % 10 and WORDS[(i * 3 + stem) % 9]) or SEPARATORS[0] for i in range(120)]
    for stem in range(2)
]


def next_token(name, position, before):
    """A third of the tokens are separators."""
    choice = before % 9
    return SEPARATORS[choice % 2] if choice < 3 else WORDS[choice]


def answer(prompt, max_tokens):
    """What an unhindered run generates."""
    tokens = list(prompt)
    before = 0
    for token in tokens:
        before = identity(before, token)
    for position in range(len(prompt), len(prompt) + max_tokens):
        tokens.append(next_token("", position, before))
        before = identity(before, tokens[-1])
    return tokens[len(prompt) :]


def propose(name, tokens):
    """Drafts of which some are right: the true continuation, spoilt at a place that varies."""
    drafts = answer(tokens, DRAFTS)
    spoilt = len(tokens) % (DRAFTS + 1)
    if spoilt < DRAFTS:
        drafts[spoilt] = WORDS[len(tokens) % 9]
    return drafts


def ngram(drafts):
    """vLLM's configuration of a proposer; the drafts themselves are :func:`propose`'s."""
    if not drafts:
        return {}
    method = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    return {"speculative_config": {**method, "num_speculative_tokens": DRAFTS}}


prompts = st.builds(
    lambda stem, cut, tail: STEMS[stem][:cut] + tail,
    st.integers(0, 1),
    st.integers(1, 120),
    st.lists(st.sampled_from([*WORDS[:2], SEPARATORS[0]]), max_size=20),
)
arrivals = st.tuples(st.just("arrive"), prompts, st.integers(1, 60), st.integers(0, 2))
actions = st.lists(
    st.one_of(
        arrivals,
        arrivals,
        arrivals,
        st.tuples(st.just("steps"), st.integers(1, 12)),
        st.tuples(st.just("abort"), st.integers(0, 7)),
        st.tuples(st.just("reset")),
    ),
    min_size=20,
    max_size=80,
)


class Traffic:
    """Random actions on a simulation, checked after each step."""

    def __init__(self, simulation, seen):
        self.simulation, self.seen, self.expected = simulation, seen, {}
        self.preempted = set()
        self.names = (f"r{i}" for i in itertools.count())

    def arrive(self, prompt, max_tokens, priority):
        name = next(self.names)
        self.expected[name] = answer(prompt, max_tokens)
        self.simulation.add(name, prompt, max_tokens, priority=priority)

    def steps(self, count):
        for _ in range(count):
            if self.simulation.scheduler.has_unfinished_requests():
                self.simulation.step()
                self.simulation.check()
                live = self.simulation.scheduler.requests.values()
                self.preempted |= {
                    (r.request_id, n) for r in live for n in range(r.num_preemptions)
                }

    def abort(self, index):
        live = self.simulation.live
        if index < len(live):
            self.simulation.abort(live[index])
            del self.expected[live[index]]
            self.simulation.check()
            self.seen["aborted"] += 1

    def reset(self):
        self.simulation.scheduler.reset_prefix_cache()

    def finish(self):
        simulation = self.simulation
        self.seen["preempted"] += len(self.preempted)
        simulation.settle()
        simulation.check()
        assert simulation.pool.get_num_free_blocks() == simulation.pool.num_gpu_blocks - 1
        assert {name: simulation.answers[name] for name in self.expected} == self.expected
        self.seen["answered"] += len(self.expected)
        self.seen["hits"] += sum(cached > 0 for cached in simulation.cached.values())


ALL_KEPT, BOUNDED = [None], [1, 5, 30]


@pytest.mark.parametrize(
    ("asynchronous", "drafts", "bounds"),
    [
        (False, False, ALL_KEPT),
        (False, True, BOUNDED),
        (True, False, BOUNDED),
        (True, True, ALL_KEPT),
        (True, True, BOUNDED),
    ],
)
def test_random_traffic(asynchronous, drafts, bounds):
    seen = Counter()

    @settings(
        max_examples=120,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        actions,
        st.sampled_from([1, 3, 16, 40]),
        st.sampled_from([0, 2, 20]),
        st.sampled_from(bounds),
        st.sampled_from(KEPT),
        st.sampled_from([14, 15, 18, 80]),
        st.booleans(),
        st.sampled_from(["fcfs", "priority"]),
    )
    def run(actions, window, sinks, bound, kept, num_blocks, caching, policy):
        simulation = Simulation(
            {
                "window_size": window,
                "num_sink_tokens": sinks,
                "max_separator_tokens": bound,
                **kept,
            },
            next_token,
            num_blocks=num_blocks + (4 if "keep_after" in kept else 0),  # more is kept
            propose=propose if drafts else None,
            asynchronous=asynchronous,
            block_size=16,
            max_model_len=192,
            max_num_batched_tokens=64,
            max_num_seqs=6,
            enable_prefix_caching=caching,
            scheduling_policy=policy,
            **ngram(drafts),
        )
        traffic = Traffic(simulation, seen)
        for action, *arguments in actions:
            getattr(traffic, action)(*arguments)
        traffic.finish()

    run()
    assert all(seen[kind] > 5 for kind in ("answered", "hits", "aborted", "preempted")), seen
