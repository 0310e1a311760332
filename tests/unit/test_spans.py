"""Tokens kept for what stands before them: the rule against the oracle, which looks back from each.

The definition is in ``vllm_sepllm/spans.py`` and, on its own, in ``oracle/dense_mask.py``.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.kept_counts import KeptCounts
from vllm_sepllm.oracle.dense_mask import KeptAfter, sepllm_mask
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.spans import LONGEST_SPAN, make_spans

pytestmark = pytest.mark.unit

VOCAB = 9
WORD, NAME, NUMBER, END = 0, 1, 2, 3

texts = st.lists(st.integers(-1, VOCAB), max_size=120)
numbers = st.dictionaries(st.integers(0, VOCAB - 1), st.integers(0, 9), max_size=4)
some_ids = st.frozensets(st.integers(0, VOCAB - 1), max_size=3)


def make(keep_after, ends, others=(), **options):
    """The rule, and the oracle's flags of a text."""
    config = SepLLMConfig(
        keep=tuple({*keep_after, *others}),
        keep_after=tuple((number, (token_id,)) for token_id, number in keep_after.items()),
        **({"segment_ends": tuple(ends)} if keep_after else {}),
        **{"num_sink_tokens": 0, "window_size": 1, **options},
    )
    after = KeptAfter(keep_after, ends)

    def expected(ids):
        sinks = config.num_sink_tokens
        mask = sepllm_mask([*ids, WORD], config.keep, sinks, 1, after=after)
        return mask[-1, :-1].tolist()

    return KeepRule.of(config, VOCAB), expected


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        ([WORD, NAME, WORD, WORD, WORD, WORD], "011100"),
        ([NAME, WORD, END, WORD, WORD], "11100"),
        ([NAME, END, NAME, WORD, WORD, WORD], "111110"),
        ([NAME, WORD, NUMBER, WORD, WORD, WORD], "111100"),
        ([NUMBER, WORD, WORD], "110"),
        ([END, WORD], "00"),
    ],
)
def test_by_hand(ids, kept):
    """A name keeps 2, a number 1."""
    rule, expected = make({NAME: 2, NUMBER: 1}, {END})
    assert rule.kept_flags(ids).tolist() == [flag == "1" for flag in kept]
    assert expected(ids) == [flag == "1" for flag in kept]


@given(ids=texts, keep_after=numbers, ends=some_ids, others=some_ids, sinks=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_the_rule_is_the_oracles(ids, keep_after, ends, others, sinks):
    rule, expected = make(keep_after, ends, others, num_sink_tokens=sinks)
    assert rule.kept_flags(ids).tolist() == expected(ids)


@given(
    ids=texts,
    keep_after=numbers,
    ends=some_ids,
    cuts=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 8)), max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_counts_in_any_pieces_and_again(ids, keep_after, ends, cuts):
    """Chunks, single tokens, and tokens taken back, as rejected drafts are."""
    rule, expected = make(keep_after, ends)
    counts = KeptCounts(rule)
    for length, back in [*cuts, (len(ids), 0)]:
        counts.extend(ids[counts.num_tokens : counts.num_tokens + length])
        counts.truncate(counts.num_tokens - min(back, counts.num_tokens))
    counts.extend(ids[counts.num_tokens :])
    assert np.diff(counts.prefix).tolist() == [int(flag) for flag in expected(ids)]


@given(ids=texts, keep_after=numbers, ends=some_ids, left=st.integers(0, LONGEST_SPAN))
@settings(max_examples=100, deadline=None)
def test_what_is_left_one_by_one_and_along(ids, keep_after, ends, left):
    pairs = [(number, [token_id]) for token_id, number in keep_after.items()]
    spans = make_spans([*pairs, (1, [VOCAB - 1])], ends, VOCAB)
    along = spans.left_along(ids, left)
    assert along[0] == left
    for place, token_id in enumerate(ids):
        behind = spans.left_behind(token_id, int(along[place]))
        assert along[place + 1] == behind
    each = spans.left_behind_each(ids, along[:-1])
    assert each.tolist() == along[1:].tolist()


@given(ids=texts, ends=some_ids)
@settings(max_examples=50, deadline=None)
def test_none_behind_is_the_class_alone(ids, ends):
    rule, expected = make({NAME: 0}, ends)
    assert rule.spans is None
    assert rule.kept_flags(ids).tolist() == [token_id == NAME for token_id in ids] == expected(ids)


@given(ids=st.lists(st.integers(-1, VOCAB), max_size=LONGEST_SPAN))
@settings(max_examples=50, deadline=None)
def test_longer_than_the_text_and_no_ends_keep_all_behind_the_first(ids):
    rule, _ = make({NAME: LONGEST_SPAN}, ())
    first = ids.index(NAME) if NAME in ids else len(ids)
    assert rule.kept_flags(ids).tolist() == [place >= first for place in range(len(ids))]


def test_every_id_an_end_is_the_class_alone():
    rule, _ = make({NAME: 9}, range(VOCAB))
    ids = [WORD, NAME, WORD, NAME, NUMBER]
    assert rule.kept_flags(ids).tolist() == [False, True, False, True, False]


def test_codes():
    rule, _ = make({NAME: 5, NUMBER: LONGEST_SPAN}, {END, NUMBER}, {4})
    assert rule.token_codes.tolist()[:5] == [0, 1 | 10, 1 | 64 | 128, 128, 1]


def test_the_oracle_counts_them_among_what_is_bounded():
    ids = [NAME, WORD, WORD, WORD, NAME, WORD, WORD, WORD]
    after = KeptAfter({NAME: 2}, frozenset())
    mask = sepllm_mask(ids, [NAME], 0, 1, max_separators=4, after=after)
    assert mask[-1].tolist() == [bool(x) for x in (0, 0, 1, 0, 1, 1, 1, 1)]
    assert torch.equal(
        sepllm_mask(ids, [NAME], 0, 1, after=KeptAfter({}, frozenset())),
        sepllm_mask(ids, [NAME], 0, 1),
    )
