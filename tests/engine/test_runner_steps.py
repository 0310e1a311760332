"""The steps of the V1 runner, as builders of several kept groups see them.

What vLLM's scheduler sends is followed to the letter. The runner here has nothing that
:class:`RunnerSteps` may not read: token ids on the host, which asynchronous scheduling leaves at
-1, are not there at all.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kept_builders import (
    MAX_STEP_TOKENS,
    NUM_DRAFTS,
    NUM_PAGES,
    PAGE,
    SINKS,
    WINDOW,
    make_batch,
    make_builders,
)
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_sepllm.engine.cpu.counts import HostCounts
from vllm_sepllm.engine.cpu.metadata import KeptMetadataBuilder
from vllm_sepllm.engine.gpu.counts import DeviceCounts
from vllm_sepllm.engine.gpu.metadata import GPUKeptMetadataBuilder
from vllm_sepllm.engine.worker.runner_steps import RunnerSteps
from vllm_sepllm.policy import KeepRule, table_of
from vllm_sepllm.spans import make_spans

pytestmark = pytest.mark.engine

VOCABULARY, NUM_ROWS, NUM_GROUPS, MAX_LEN = 10, 4, 2, 500
SPANS = make_spans([(3, [3])], [4], VOCABULARY)
PLAIN = KeepRule(SINKS, WINDOW, table_of([0, 3], VOCABULARY))
WITH_SPANS = replace(PLAIN, spans=SPANS)
POLICIES = {"cpu": PLAIN, "cpu, spans": WITH_SPANS, "device": WITH_SPANS}
BUILDERS = {
    "cpu": KeptMetadataBuilder,
    "cpu, spans": KeptMetadataBuilder,
    "device": GPUKeptMetadataBuilder,
}


def make_counts(kind):
    if kind != "device":
        return HostCounts(POLICIES[kind], NUM_ROWS, MAX_LEN)
    sizes = NUM_ROWS, MAX_LEN, MAX_STEP_TOKENS, 2 * NUM_DRAFTS
    return DeviceCounts(POLICIES[kind], *sizes, torch.device("cpu"))


def read(kind, metadata, group):
    """Entry of each token in its group's stream, below 0 if it has none; and its stream limit."""
    if kind == "device":
        slots, limits = metadata.stream_slots.numpy(), metadata.stream_ranges[:, 1].numpy()
    else:
        batch = metadata.batch
        slots, limits = np.full(batch.query_start[-1], -1), []
        slots[metadata.token_index] = metadata.slot_mapping
        for row, start, stop in zip(batch.rows, batch.starts, batch.stops, strict=True):
            limits.extend(
                POLICIES[kind].stream_limit(batch.kept_prefix[row], np.arange(start, stop))
            )
    first = (1 + group) * PAGE
    return np.where(slots < 0, -1, slots - first) % (NUM_PAGES * PAGE), limits


class Runner:
    """The V1 runner without a model, and what the scheduler knows of each request."""

    def __init__(self, kind, builders):
        self.kind, self.builders = kind, builders
        self.input_batch = SimpleNamespace(req_ids=[])
        self.input_ids = SimpleNamespace(gpu=torch.zeros(MAX_STEP_TOKENS, dtype=torch.int32))
        self.ids, self.computed, self.restarts = {}, {}, []
        self._scheduled = set()
        rows = make_counts(kind)
        restart = rows.restart

        def record(row, token_ids):
            self.restarts.append(len(token_ids))
            restart(row, token_ids)

        rows.restart = record
        self.steps = RunnerSteps(rows, self)
        self.steps.follow()
        for builder in builders:
            builder.steps = self.steps

    def step(self, lengths, new=(), resumed=(), finished=(), preempted=(), **starts):
        """Compute so many tokens of each request, from where it stands or from ``starts`` on."""
        self.computed.update(starts)
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = lengths
        output.total_num_scheduled_tokens = sum(lengths.values())
        output.finished_req_ids, output.preempted_req_ids = set(finished), set(preempted)
        output.scheduled_new_reqs = [
            NewRequestData(r, self.ids[r].tolist(), [], None, None, ([],), self.computed[r], None)
            for r in new
        ]
        cached = [r for r in lengths if r not in new]
        absent = [r for r in cached if r not in self._scheduled or r in resumed]
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=cached,
            resumed_req_ids=set(resumed),
            new_token_ids=[],
            all_token_ids={r: self.ids[r][: self.computed[r] + 1].tolist() for r in absent},
            new_block_ids=[None] * len(cached),
            num_computed_tokens=[self.computed[r] for r in cached],
            num_output_tokens=[0] * len(cached),
        )
        self._scheduled = set(lengths)
        self.execute_model(output)
        for name, length in lengths.items():
            self.computed[name] += length

    def execute_model(self, output):
        """Prepare inputs and build metadata; every group is to find what the ids say."""
        lengths = output.num_scheduled_tokens
        names = sorted(lengths)
        self.input_batch.req_ids = names
        spans = [slice(self.computed[r], self.computed[r] + lengths[r]) for r in names]
        ids = np.concatenate([self.ids[r][s] for r, s in zip(names, spans, strict=True)])
        self.input_ids.gpu[: len(ids)] = torch.from_numpy(ids)
        wanted_entries, wanted_limits = [], []
        for i, (name, span) in enumerate(zip(names, spans, strict=True)):
            policy = POLICIES[self.kind]
            kept = policy.kept_flags(self.ids[name])
            prefix = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
            entries = i * NUM_PAGES * PAGE + prefix[:-1]
            wanted_entries.extend(np.where(kept, entries, -1)[span] % (NUM_PAGES * PAGE))
            wanted_limits.extend(policy.stream_limit(prefix, np.arange(span.start, span.stop)))
        built = []
        for group, builder in enumerate(self.builders):
            sizes = [lengths[r] for r in names], [s.stop for s in spans]
            metadata = builder.build(0, make_batch(*sizes, first_page=1 + group))
            built.append(metadata)
            entries, limits = read(self.kind, metadata, group)
            assert list(entries) == list(wanted_entries)
            assert list(limits) == list(wanted_limits)
        if self.kind != "device":
            assert all(each.masks is built[0].masks for each in built), "masks of each group"


@pytest.fixture(scope="module", params=BUILDERS)
def builders(request):
    return request.param, make_builders(BUILDERS[request.param], NUM_GROUPS)


@pytest.fixture
def runner(builders):
    runner, rng = Runner(*builders), np.random.default_rng(0)
    for name in "abcdefgh":
        runner.ids[name] = rng.integers(0, VOCABULARY, 150).astype(np.int32)
        runner.computed[name] = 0
    return runner


def test_steady_decoding_counts_nothing_again(runner):
    """Nor do chunks of prompts: a request is restarted when it starts, and never after."""
    runner.step({"a": 40, "b": 3}, new="ab")
    runner.step({"a": 40, "b": 1, "c": 9}, new="c")
    assert runner.restarts == [0, 0, 0]
    for _ in range(12):
        runner.step({"a": 1, "b": 1, "c": 1})
    assert runner.restarts == [0, 0, 0]


def test_a_request_that_sits_out_steps_is_not_counted_again(runner):
    runner.step({"a": 20, "b": 20}, new="ab")
    for names in ("a", "b", "b", "ab", "a"):
        runner.step(dict.fromkeys(names, 1))
    assert runner.restarts == [0, 0]


def test_a_prefix_hit_is_counted_once(runner):
    runner.step({"a": 30}, new="a", a=48)
    runner.step({"a": 1})
    assert runner.restarts == [48]


@pytest.mark.parametrize("hit", [0, 7, 32, 48])
def test_a_preempted_request_resumes_anywhere(runner, hit):
    """With another's row, which held something else."""
    runner.step({"a": 40}, new="a")
    for _ in range(6):
        runner.step({"a": 2})
    runner.step({"b": 30}, new="b", preempted="a")
    runner.step({"b": 1, "c": 30}, new="c")
    runner.step({"a": 14, "b": 1, "c": 1}, resumed="a", a=hit)
    for _ in range(3):
        runner.step({"a": 1, "b": 1, "c": 1})
    assert runner.restarts == [0, 0, 0, hit]


def test_a_request_may_resume_in_the_step_that_preempts_it(runner):
    """As when the prefix cache is reset with requests running."""
    runner.step({"a": 40}, new="a")
    runner.step({"a": 10}, preempted="a", resumed="a", a=16)
    runner.step({"a": 1})
    assert runner.restarts == [0, 16]


def test_preempted_requests_leave_their_rows(runner):
    runner.step(dict.fromkeys("abcd", 9), new="abcd")
    runner.step(dict.fromkeys("abef", 9), new="ef", preempted="cd")
    runner.step(dict.fromkeys("abef", 1))
    runner.step(dict.fromkeys("efcd", 10), resumed="cd", preempted="ab", c=0, d=0)
    runner.step(dict.fromkeys("cdef", 1))
    assert runner.restarts == [0] * 8


def test_an_id_that_ends_and_starts_again_in_one_step(runner):
    runner.step({"a": 30}, new="a")
    runner.step({"a": 1})
    runner.ids["a"] = runner.ids["b"]
    runner.step({"a": 30}, new="a", finished="a", a=0)
    runner.step({"a": 1})
    assert runner.restarts == [0, 0]


def test_turns_of_a_session(runner):
    """Each turn comes as a new request under the old id; the last token of the one before, which
    was never computed, is left out."""
    runner.step({"a": 30}, new="a")
    runner.step({"a": 1})
    runner.ids["a"][31:] = runner.ids["b"][31:]
    runner.step({"a": 20}, new="a")
    runner.step({"a": 1})
    assert runner.restarts == [0, 31]


def test_sessions_that_wait_hold_no_row(runner):
    """They are listed as preempted when their turn ends; those that run keep their rows."""
    runner.step(dict.fromkeys("abcd", 9), new="abcd")
    runner.step(dict.fromkeys("cd", 1), preempted="ab")
    runner.step({"c": 1, "e": 9}, new="e")  # d sits out one step
    runner.step({"d": 1, "e": 1, "f": 9}, new="f")
    runner.step(dict.fromkeys("cdef", 1))
    assert runner.restarts == [0] * 6
    runner.step({"a": 5}, new="a", finished="cdef")
    runner.step({"a": 1, "b": 5}, new="b")
    assert runner.restarts == [0] * 6 + [9, 9]


def test_rejected_drafts_are_counted_again(runner):
    runner.step({"a": 16}, new="a")
    right = runner.ids["a"].copy()
    for accepted in (1, 3, 4, 1, 2, 4, 4, 1):
        start = runner.computed["a"]
        runner.ids["a"][start + accepted :] = 0  # separators
        runner.step({"a": 1 + NUM_DRAFTS})
        runner.ids["a"] = right.copy()
        runner.computed["a"] = start + accepted
    assert runner.restarts == [0]


def test_batches_of_vllms_own_making_are_no_steps(runner):
    """Before the first step, between steps, in one without tokens, and after one that failed."""
    assert runner.steps.current() is None
    runner.step({"a": 20}, new="a")
    assert runner.steps.current() is None
    with runner.steps.during(SchedulerOutput.make_empty()):
        assert runner.steps.current() is None
    runner.input_ids.gpu, kept = None, runner.input_ids.gpu
    with pytest.raises(TypeError):
        runner.step({"a": 1})
    assert runner.steps.current() is None
    runner.input_ids.gpu = kept
    runner.step({"a": 1})
    assert runner.restarts == [0]


def test_nothing_is_counted_of_a_made_up_batch(runner):
    """Graphs are captured from such batches on a GPU; vLLM on CPU builds no metadata for one."""
    if runner.kind != "device":
        with pytest.raises(AssertionError, match="not told what the batch is"):
            runner.builders[0].build(0, make_batch([1], [20]))
        return
    runner.step({"a": 20}, new="a")
    metadata = runner.builders[0].build(0, make_batch([1], [20]))
    assert metadata.stream_slots.tolist() == [-1]
    assert not metadata.stream_ranges.any()
    runner.step({"a": 1})


def test_ids_that_are_not_known_on_the_host_are_missed(runner):
    """Rather than counted as something else."""
    runner.ids["a"] = runner.ids["a"][:20]
    with pytest.raises(AssertionError, match="30 tokens of a are computed, 20 known"):
        runner.step({"a": 1}, new="a", a=30)
