"""Counting on the device, and the metadata that CUDA graphs are replayed with."""

import numpy as np
import pytest
import torch
from kept_builders import PAGE, SINKS, WINDOW, make_batch, make_builders

from vllm_sepllm.engine.gpu.counts import DeviceCounts
from vllm_sepllm.engine.gpu.metadata import GPUKeptMetadataBuilder
from vllm_sepllm.policy import KeepRule, table_of
from vllm_sepllm.spans import make_spans

pytestmark = pytest.mark.engine

VOCABULARY = 10
SPANS = make_spans([(4, [3]), (1, [0])], [5, 6], VOCABULARY)
POLICIES = {
    "sepllm": KeepRule(SINKS, WINDOW, table_of([0, 3], VOCABULARY)),
    "streaming": KeepRule(SINKS, WINDOW, table_of((), VOCABULARY)),
    "fixed_interval": KeepRule(SINKS, WINDOW, table_of((), VOCABULARY), interval=4),
    "bounded": KeepRule(SINKS, WINDOW, table_of([0, 3], VOCABULARY), max_separator_tokens=4),
    "even ids": KeepRule(SINKS, WINDOW, np.arange(VOCABULARY) % 2 == 0, interval=7),
    "spans": KeepRule(SINKS, WINDOW, table_of([0, 3], VOCABULARY), spans=SPANS),
}
CPU = torch.device("cpu")


def make_counts(policy=POLICIES["sepllm"], max_step=16, rejected=3, max_len=500):
    return DeviceCounts(policy, 4, max_len, max_step, rejected, CPU)


def expected(policy, ids, start):
    """Kept flags and stream limits of positions ``[start, len(ids))``."""
    kept = policy.kept_flags(ids)
    prefix = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    position = np.arange(start, len(ids))
    return kept[start:], policy.stream_limit(prefix, position)


def step(rows, row, ids, start):
    """Compute ``ids[start:]`` of the request in ``row``: kept flags and stream limits."""
    count = len(ids) - start
    slots, ranges = torch.full((count,), 99), torch.full((count, 2), 99, dtype=torch.int32)
    table = torch.arange(1, 60, dtype=torch.int32)[None]
    rows.count(
        torch.tensor(ids[start:], dtype=torch.int32),
        torch.tensor([row]),
        torch.tensor([0, count], dtype=torch.int32),
        torch.tensor([len(ids)], dtype=torch.int32),
        table,
        PAGE,
        slots,
        ranges,
    )
    return (slots >= 0).numpy(), ranges[:, 1].numpy()


def check(rows, row, ids, start, policy=POLICIES["sepllm"]):
    for found, right in zip(step(rows, row, ids, start), expected(policy, ids, start), strict=True):
        assert (found == right).all()


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_counts_as_it_says(name):
    rng = np.random.default_rng(0)
    policy, rows = POLICIES[name], make_counts(POLICIES[name])
    ids = rng.integers(0, VOCABULARY, 200)
    rows.restart(1, ids[:0])
    for start in range(0, 200, 16):
        check(rows, 1, ids[: start + 16], start, policy)


@pytest.mark.parametrize("name", ["sepllm", "spans"])
@pytest.mark.parametrize("computed", [0, 1, 5, 30, 130])
def test_a_request_resumes_anywhere(computed, name):
    """After a prefix hit or a preemption, whatever the row held before; within a span too."""
    rng = np.random.default_rng(1)
    policy, rows = POLICIES[name], make_counts(POLICIES[name])
    check(rows, 2, rng.integers(0, VOCABULARY, 14), 0, policy)
    ids = rng.integers(0, VOCABULARY, 140)
    if computed > 2:
        ids[computed - 2 : computed + 2] = 3, 1, 2, 1
    rows.restart(2, ids[:computed])
    check(rows, 2, ids[: computed + 10], computed, policy)


def test_spans_go_on_behind_rejected_drafts():
    rng = np.random.default_rng(2)
    policy, rows = POLICIES["spans"], make_counts(POLICIES["spans"])
    ids = rng.integers(0, VOCABULARY, 160)
    rows.restart(1, ids[:0])
    start = 0
    for rejected in (0, 3, 1, 2, 3, 3):
        drafts = rng.integers(0, VOCABULARY, 3)
        check(rows, 1, np.concatenate([ids[: start + 9], drafts[:rejected]]), start, policy)
        start += 9


def test_memory_does_not_grow_with_length():
    short, long = (make_counts(max_len=n)._kept_prefix.numel() for n in (1000, 1_000_000))
    assert short == long == 4 * (WINDOW + 16 + 3 + 1)


@pytest.fixture(scope="module")
def builder():
    [builder] = make_builders(GPUKeptMetadataBuilder, 1)
    return builder


def test_decodes_come_first(builder):
    """Up to the drafts to be verified and one more; the rest are chunks of prompts."""
    batch = make_batch([1, 4, 4, 5, 20], [30, 40, 9, 5, 50])
    rows = make_counts(max_step=64)
    for row, count in enumerate([29, 36, 5, 0, 30]):
        rows.restart(row % 4, np.zeros(count, dtype=np.int32))
    step = rows.step(torch.arange(5) % 4, torch.zeros(34, dtype=torch.int32))
    found = builder.build(0, batch, step=step)
    assert (found.num_decodes, found.num_decode_tokens, found.num_reqs) == (3, 9, 5)
    assert (found.max_decode_query_len, found.max_query_len) == (4, 20)


def test_graphs_find_everything_where_it_was(builder):
    """Buffers are the same in every step; what is padding is written and seen by nobody."""
    rows = make_counts(max_step=64)
    step = rows.step(torch.tensor([0, 1]), torch.zeros(64, dtype=torch.int32))
    first = builder.build(0, make_batch([1, 1], [1, 1], padding=2), step=step)
    kept = [1, 1]  # the first token is a sink
    assert (first.stream_slots >= 0).tolist() == [*map(bool, kept), False, False]
    assert not first.stream_ranges[2:].any()
    again = builder.build(0, make_batch([1], [2], padding=3), step=step)
    assert again.stream_slots.data_ptr() == first.stream_slots.data_ptr()
    assert again.stream_ranges.data_ptr() == first.stream_ranges.data_ptr()
    assert (again.stream_slots >= 0).tolist() == [True, False, False, False]


def test_a_batch_of_vllms_own_making_is_written_nowhere(builder):
    """As those that graphs are captured from, and steps taken for other replicas."""
    builder._slots.fill_(7)
    builder._ranges.fill_(7)
    found = builder.build(0, make_batch([4, 4], [512, 512]))
    assert (found.stream_slots == -1).all()
    assert not found.stream_ranges.any()
    assert found.num_decodes == 2
