from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.kept_counts import KeptCounts
from vllm_sepllm.policy import KeepRule, table_of

pytestmark = pytest.mark.unit

VOCAB = 8


def policy_of(sinks: int, window: int, separators: frozenset[int] = frozenset({2, 5})) -> KeepRule:
    return KeepRule(sinks, window, table_of(separators, VOCAB))


def is_visible(query: int, key: int, ids: list[int], sinks: int, window: int, separators) -> bool:
    """The paper's definition, word for word, sharing no code with the package."""
    if key > query:
        return False
    distance = query - key
    return key < sinks or ids[key] in separators or distance < window


token_ids = st.lists(st.integers(-1, VOCAB + 1), max_size=200)
sinks = st.integers(0, 12)
windows = st.one_of(st.integers(1, 20), st.just(1), st.just(1000))
separator_sets = st.frozensets(st.integers(0, VOCAB - 1), max_size=4)


@given(ids=token_ids, a=sinks, n=windows, separators=separator_sets)
@settings(max_examples=150, deadline=None)
def test_stream_and_window_are_exactly_the_visible_set(ids, a, n, separators):
    policy = policy_of(a, n, separators)
    counts = KeptCounts(policy)
    counts.extend(ids)
    stream = [position for position in range(len(ids)) if policy.kept_flags(ids)[position]]
    for query in range(0, len(ids), 3):
        limit = int(policy.stream_limit(counts.prefix, query))
        start = int(policy.window_start(query))
        parts = stream[:limit] + list(range(start, query + 1))
        visible = [k for k in range(len(ids)) if is_visible(query, k, ids, a, n, separators)]
        assert parts == visible  # equal lists: in order, and none twice


@given(ids=token_ids, a=sinks, n=windows, separators=separator_sets, bound=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_bounded_separators(ids, a, n, separators, bound):
    """Sinks and, of the separators behind the window, the newest."""
    policy = replace(policy_of(a, n, separators), max_separator_tokens=bound)
    counts = KeptCounts(policy)
    counts.extend(ids)
    stream = [position for position in range(len(ids)) if policy.kept_flags(ids)[position]]
    last_start = 0
    for query in range(len(ids)):
        limit = int(policy.stream_limit(counts.prefix, query))
        start = int(policy.seen.first_entries(limit))
        assert start >= last_start, "an entry comes back"
        last_start = start
        behind = range(max(0, query - n + 1))
        older = [k for k in behind if k >= a and ids[k] in separators]
        visible = [k for k in behind if k < a] + older[-bound:]
        assert stream[: min(a, limit)] + stream[start:limit] == visible


def test_worked_example_of_the_module():
    ids = [0, 1, 2, 1, 1, 2, 1, 2, 1, 1]
    policy = policy_of(1, 3, frozenset({2}))
    assert np.flatnonzero(policy.kept_flags(ids)).tolist() == [0, 2, 5, 7]
    counts = KeptCounts(policy)
    counts.extend(ids)
    assert counts.prefix.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]
    assert policy.window_start(9) == 7
    assert policy.stream_limit(counts.prefix, 9) == 3


def test_window_longer_than_the_text_needs_no_stream():
    policy = policy_of(4, 50)
    counts = KeptCounts(policy)
    counts.extend([2] * 50)
    positions = np.arange(50)
    assert not policy.stream_limit(counts.prefix, positions).any()
    assert not policy.window_start(positions).any()


def test_window_of_one_is_the_own_token():
    policy = policy_of(0, 1)
    counts = KeptCounts(policy)
    counts.extend([2, 1, 2, 1])
    assert policy.window_start(np.arange(4)).tolist() == [0, 1, 2, 3]
    assert policy.stream_limit(counts.prefix, np.arange(4)).tolist() == [0, 1, 1, 2]


@given(ids=token_ids, a=sinks, separators=separator_sets, cut=st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_flags_do_not_depend_on_where_a_prompt_is_cut(ids, a, separators, cut):
    policy = policy_of(a, 3, separators)
    cut = min(cut, len(ids))
    parts = [policy.kept_flags(ids[:cut]), policy.kept_flags(ids[cut:], first_position=cut)]
    whole = policy.kept_flags(ids)
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert whole.tolist() == [p < a or t in separators for p, t in enumerate(ids)]


@given(ids=token_ids, a=sinks, seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_flags_at_positions_agree_with_flags_in_order(ids, a, seed):
    policy = policy_of(a, 3)
    order = np.random.default_rng(seed).permutation(len(ids))
    shuffled = np.asarray(ids, dtype=np.int64)[order]
    expected = policy.kept_flags(ids)[order]
    assert policy.kept_flags_at(shuffled, order)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("outside", [-1, VOCAB, 10**9])
def test_ids_outside_the_vocabulary_are_no_separators(outside):
    policy = policy_of(1, 3, frozenset(range(VOCAB)))
    assert policy.kept_flags([outside, outside, 0]).tolist() == [True, False, True]
    counts = KeptCounts(policy)
    for token in [outside, outside, 0]:
        counts.extend([token])
    assert counts.prefix.tolist() == [0, 1, 1, 2]


@given(
    ids=token_ids,
    a=sinks,
    separators=separator_sets,
    steps=st.lists(st.integers(0, 70), max_size=30),
)
@settings(max_examples=100, deadline=None)
def test_counting_in_pieces_equals_counting_at_once(ids, a, separators, steps):
    policy = policy_of(a, 3, separators)
    bulk, pieces = KeptCounts(policy), KeptCounts(policy)
    bulk.extend(ids)
    done = 0
    for step in [*steps, len(ids)]:
        pieces.extend(ids[done : done + step])
        done = min(done + step, len(ids))
    expected = [0]
    for position, token in enumerate(ids):
        expected.append(expected[-1] + (position < a or token in separators))
    assert bulk.prefix.tolist() == pieces.prefix.tolist() == expected
    assert bulk.num_tokens == len(ids)
    assert bulk.prefix.dtype == np.int32


@pytest.mark.parametrize("length", [0, 1, 62, 63, 64, 65, 127, 128, 129, 5000])
def test_single_steps_across_the_growth_of_the_buffer(length):
    counts = KeptCounts(policy_of(0, 1))
    for position in range(length):
        counts.extend([2 if position % 3 == 0 else 1])
    assert counts.prefix.size == length + 1
    assert counts.kept(length) == -(-length // 3)


@pytest.mark.parametrize("to", [0, 1, 3, 10, 63])
def test_truncate_then_another_continuation(to):
    policy = policy_of(2, 3)
    first, second = [1, 2] * 40, [5, 5, 1]
    counts = KeptCounts(policy)
    counts.extend(first)
    counts.truncate(to)
    assert counts.num_tokens == to
    counts.extend(second)
    fresh = KeptCounts(policy)
    fresh.extend(first[:to] + second)
    assert counts.prefix.tolist() == fresh.prefix.tolist()


def test_truncate_past_the_end_forgets_nothing():
    counts = KeptCounts(policy_of(0, 3))
    counts.extend([2, 1, 2])
    counts.truncate(10)
    assert counts.prefix.tolist() == [0, 1, 1, 2]


def test_tokens_not_known_yet_count_as_kept():
    counts = KeptCounts(policy_of(0, 3))
    assert counts.kept(3) == 3
    counts.extend([1, 2, 1])
    assert [counts.kept(length) for length in range(6)] == [0, 0, 1, 1, 2, 3]
    counts.extend([1])  # known now, and not kept: the count goes down
    assert counts.kept(5) == 2


def test_from_config_takes_sizes_and_ids():
    config = SepLLMConfig(num_sink_tokens=1, window_size=9, separator_token_ids=(3, 6))
    policy = KeepRule.of(config, VOCAB)
    assert (policy.num_sink_tokens, policy.window_size) == (1, 9)
    assert np.flatnonzero(policy.is_kept).tolist() == [3, 6]
    assert policy.is_kept.shape == (VOCAB,)


def test_from_config_wants_resolved_ids():
    with pytest.raises(ValueError, match="keep is not resolved: call resolve_kept"):
        KeepRule.of(SepLLMConfig(), VOCAB)


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**63, 2**70])
def test_separators_outside_the_vocabulary_are_refused(token_id):
    with pytest.raises(ValueError, match=f"{token_id}: must be below the vocabulary size {VOCAB}"):
        table_of([1, token_id], VOCAB)


def test_the_policy_of_the_documentation(added_policy):
    """CONTRIBUTING's example, as it stands there."""
    rule = KeepRule.of(SepLLMConfig(policy=added_policy, num_sink_tokens=1), VOCAB)
    ids = [3, 5, 2, 7, 4, VOCAB, -2]
    assert rule.kept_flags(ids).tolist() == [True, False, True, False, True, False, False]


@given(
    ids=token_ids,
    a=sinks,
    config=st.one_of(
        st.just(SepLLMConfig(policy="streaming")),
        st.builds(SepLLMConfig, policy=st.just("fixed_interval"), interval=st.integers(1, 9)),
    ),
    first=st.integers(0, 20),
)
@settings(max_examples=100, deadline=None)
def test_other_policies_look_at_positions_only(ids, a, config, first):
    policy = KeepRule.of(replace(config, num_sink_tokens=a), VOCAB)
    interval = config.interval or 10**9
    expected = [p < a or (p % interval == 0 and interval < 10**9) for p in range(first + len(ids))]
    assert policy.kept_flags(ids, first).tolist() == expected[first:]
    one_by_one, at_once = KeptCounts(policy), KeptCounts(policy)
    for token in ids:
        one_by_one.extend([token])
    at_once.extend(ids)
    assert one_by_one.prefix.tolist() == at_once.prefix.tolist()
