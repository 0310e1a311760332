"""The plan of a batch names exactly the visible tokens, whatever the page edges."""

import numpy as np
import pytest

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.engine.cpu.plan import Batch, plan_batch, staging_pages_per_request
from vllm_sepllm.kept_counts import KeptCounts
from vllm_sepllm.policy import KeepRule

pytestmark = pytest.mark.engine

VOCABULARY = 10
SEPARATOR = 0
WRONG = -1  # content of anything that must not be read


class Pages:
    """A pool of numpy pages that hold positions instead of keys, and where keys are rotated to."""

    def __init__(self, block_size, num_requests, max_len, rng):
        per_request = -(-max_len // block_size) + 1
        self.block_size = block_size
        self.content = np.full((2 * num_requests * per_request + 1, block_size), WRONG)
        self.angle = self.content.copy()
        pages = rng.permutation(len(self.content) - 1) + 1
        tables = pages.reshape(2, num_requests, per_request).astype(np.int32)
        self.window, self.stream = tables

    def write(self, table, entry, value):
        at = table[entry // self.block_size], entry % self.block_size
        self.content[at], self.angle[at] = value, entry  # of the stream: its place there


def make_batch(policy, lengths, queries, block_size, rng):
    """Requests of ``lengths`` tokens whose last ``queries`` are computed now."""
    pages = Pages(block_size, len(lengths), max(lengths), rng)
    ids = [rng.integers(0, VOCABULARY, n) for n in lengths]
    prefix = np.zeros((len(lengths), max(lengths) + 1), dtype=np.int32)
    for i, tokens in enumerate(ids):
        counts = KeptCounts(policy)
        counts.extend(tokens.tolist())
        prefix[i, : len(tokens) + 1] = counts.prefix
        first = len(tokens) - queries[i] - policy.window_size + 1
        for p in range(len(tokens)):
            if p >= first:  # earlier pages of the window have been given away
                pages.write(pages.window[i], p, p)
            if prefix[i, p + 1] > prefix[i, p]:
                pages.write(pages.stream[i], prefix[i, p], p)
    stops = np.asarray(lengths, dtype=np.int64)
    starts = stops - np.asarray(queries)
    query_start = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    rows = np.arange(len(lengths))
    return ids, pages, Batch(query_start, starts, stops, rows, prefix, pages.stream)


def visible(policy, ids, position):
    """Positions a query sees, from the definition."""
    window = range(max(0, position - policy.window_size + 1), position + 1)
    behind = range(window.start)
    sinks = [k for k in behind if k < policy.num_sink_tokens]
    separators = [k for k in behind if k >= policy.num_sink_tokens and ids[k] == SEPARATOR]
    if policy.max_separator_tokens is not None:
        separators = separators[-policy.max_separator_tokens :]
    return [*sinks, *separators, *window]


def staged(reads, content, shifts=0):
    """The staging area after the copies the plan asks for."""
    count = 1 + int(reads.block_table[reads.staged].max(initial=-1))
    area = np.full((count, content.shape[1]), WRONG)
    if reads.merged is not None:
        for j, split in enumerate(reads.merged.splits):
            area[j] = content[reads.merged.heads[j]]
            area[j, :split] = content[reads.merged.tails[j], :split]
    if reads.packed is not None:
        packed = reads.packed
        area.flat[packed.slots] = content[packed.pages, packed.offsets] + shifts
    return area


def read_row(reads, row, content, shifts=0):
    """Entries of the pages a row names, in order."""
    area = staged(reads, content, shifts)
    is_staged = set(zip(*(index.tolist() for index in reads.staged), strict=True))
    width = -(-int(reads.seq_lens[row]) // content.shape[1])
    read = [
        (area if (row, column) in is_staged else content)[page]
        for column, page in enumerate(reads.block_table[row, :width])
    ]
    return np.concatenate(read)[: reads.seq_lens[row]].tolist()


def check(policy, ids, pages, plan):
    served = plan.batch.starts.tolist()  # queries up to here have been looked at, per request
    if plan.paged is not None:
        reads = plan.paged
        for row, request in enumerate(reads.requests):
            served[request] += int(reads.query_start[row + 1] - reads.query_start[row])
            keys = read_row(reads, row, pages.content)
            last = served[request] - 1
            if plan.batch.starts[request] < last:  # causal rows keep the order of positions
                assert last < policy.window_size
                assert keys == list(range(last + 1))
            else:
                assert sorted(keys) == visible(policy, ids[request], last)
    for row in plan.staircase:
        chunk, stop = (int(x[row.request]) for x in (plan.batch.starts, plan.batch.stops))
        start = chunk + row.first_query
        assert start == served[row.request]
        assert start >= policy.window_size, "a query that sees all before it, as dense ones do"
        stream = pages.content[row.stream_pages].reshape(-1)
        before = pages.content[row.window_pages].reshape(-1)
        before = before[row.window_first : row.window_first + row.window_length].tolist()
        window = before + list(range(chunk + row.chunk_first, stop))
        for position in range(start, stop):
            own = len(window) - stop + position
            part = window[max(0, own - policy.window_size + 1) : own + 1]
            limit = row.stream_limits[position - start]
            entries = stream[:limit].tolist()
            if row.stream_starts is not None:
                sinks = min(policy.num_sink_tokens, limit)
                begin = row.stream_starts[position - start]
                assert begin >= sinks
                entries = entries[:sinks] + entries[begin:]
            assert sorted(entries + part) == visible(policy, ids[row.request], position)
        served[row.request] = stop
    assert served == plan.batch.stops.tolist()


def check_cache_positions(policy, ids, pages, plan):
    """Every query is as far from the keys it meets as in a cache numbered from 0."""
    reads = plan.paged
    if reads is not None:
        shifts = reads.shifts
        of_entries = 0 if shifts is None else shifts.positions[shifts.of_entries]
        for row, request in enumerate(reads.requests):
            last = int(plan.batch.stops[request]) - 1
            if plan.batch.starts[request] < last:
                first, stop = reads.query_start[row : row + 2]
                given = 0 if shifts is None else shifts.positions[shifts.of_queries[first:stop]]
                assert not np.any(given), "all of it is in the window"
                continue
            query = last
            if shifts is not None:
                query += shifts.positions[shifts.of_queries[reads.query_start[row]]]
            keys = read_row(reads, row, pages.content)
            angles = read_row(reads, row, pages.angle, of_entries)
            number = {key: i for i, key in enumerate(visible(policy, ids[request], last))}
            for key, angle in zip(keys, angles, strict=True):
                assert query - angle == number[last] - number[key]
    for row in plan.staircase:
        start, stop = (int(x[row.request]) for x in (plan.batch.starts, plan.batch.stops))
        start += row.first_query
        stream = pages.content[row.stream_pages].reshape(-1)
        angles = pages.angle[row.stream_pages].reshape(-1)
        for i, position in enumerate(range(start, stop)):
            number = {key: n for n, key in enumerate(visible(policy, ids[row.request], position))}
            begin = 0 if row.stream_starts is None else int(row.stream_starts[i])
            for entry in range(begin, row.stream_limits[i]):
                distance = position - row.stream_shifts[i] - angles[entry]
                assert distance == number[position] - number[stream[entry]]
            if row.stream_starts is not None:
                for entry in range(min(policy.num_sink_tokens, row.stream_limits[i])):
                    distance = position - row.sink_shifts[i] - angles[entry]
                    assert distance == number[position] - number[stream[entry]]


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 16, 32, 37, 500])
@pytest.mark.parametrize("sinks", [0, 1, 4, 33])
@pytest.mark.parametrize("bound", [None, 1, 5, 8])
def test_plan_reads_the_visible_tokens(block_size, window, sinks, bound):
    rng = np.random.default_rng(window * 100 + sinks)
    table = np.arange(VOCABULARY) == SEPARATOR
    policy = KeepRule(sinks, window, table, max_separator_tokens=bound)
    for _ in range(6):
        lengths = rng.integers(1, 120, 7).tolist()
        queries = [int(rng.integers(1, n + 1)) if rng.random() < 0.4 else 1 for n in lengths]
        ids, pages, batch = make_batch(policy, lengths, queries, block_size, rng)
        check(policy, ids, pages, plan_batch(policy, batch, pages.window, block_size))
        plan = plan_batch(policy, batch, pages.window, block_size, in_cache_positions=True)
        check(policy, ids, pages, plan)
        check_cache_positions(policy, ids, pages, plan)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["no separators", "only separators"])
@pytest.mark.parametrize("window", [1, 6, 8])
def test_plan_of_extreme_texts(share, window):
    rng = np.random.default_rng(5)
    policy = KeepRule(2, window, np.arange(VOCABULARY) == SEPARATOR)
    lengths, queries = list(range(1, 41)), [1] * 40
    if share == 1.0:
        everything = KeepRule(2, window, np.ones(VOCABULARY, dtype=bool))
        ids, pages, batch = make_batch(everything, lengths, queries, 4, rng)
        ids = [np.full(n, SEPARATOR) for n in lengths]
    else:
        nothing = KeepRule(2, window, np.zeros(VOCABULARY, dtype=bool))
        ids, pages, batch = make_batch(nothing, lengths, queries, 4, rng)
        ids = [np.ones(n, dtype=int) for n in lengths]
    check(policy, ids, pages, plan_batch(policy, batch, pages.window, 4))


@pytest.mark.parametrize(
    ("window", "block_size"), [(32, 32), (256, 32), (16, 16), (100, 32), (1, 16), (650, 16)]
)
@pytest.mark.parametrize("bound", [None, 1, 20, 37, 300, 100_000])
@pytest.mark.parametrize("sinks", [3, 90, 100_000])
@pytest.mark.parametrize("position_mode", ["original", "cache"])
def test_staging_stays_within_what_is_reserved(window, block_size, bound, sinks, position_mode):
    rng = np.random.default_rng(0)
    table = np.arange(VOCABULARY) == SEPARATOR
    policy = KeepRule(sinks, window, table, max_separator_tokens=bound)
    lengths = rng.integers(1, 700, 60).tolist()
    _ids, pages, batch = make_batch(policy, lengths, [1] * 60, block_size, rng)
    in_cache_positions = position_mode == "cache"
    reads = plan_batch(policy, batch, pages.window, block_size, in_cache_positions).paged
    per_request = np.bincount(reads.staged[0], minlength=1)
    options = SepLLMConfig(
        window_size=window,
        num_sink_tokens=sinks,
        max_separator_tokens=bound,
        position_mode=position_mode,
    )
    assert per_request.max() <= staging_pages_per_request(options, block_size, max(lengths))
    pages_named = reads.block_table[reads.staged]
    assert sorted(pages_named) == list(range(len(pages_named))), "a staging page is used twice"


@pytest.mark.parametrize("position_mode", ["original", "cache"])
@pytest.mark.parametrize("large", ["window_size", "num_sink_tokens", "max_separator_tokens"])
def test_staging_is_sized_by_what_a_context_can_hold(large, position_mode):
    """An option larger than any context reserves what the context's length as option does."""
    options = {"window_size": 64, "max_separator_tokens": 32, "position_mode": position_mode}

    def pages(value):
        return staging_pages_per_request(SepLLMConfig(**{**options, large: value}), 32, 1024)

    assert pages(100_000) == pages(1024) <= 1024 // 32


@pytest.mark.parametrize("position_mode", ["original", "cache"])
@pytest.mark.parametrize("bound", [None, 100_000])
def test_a_window_over_every_context_stages_a_handful(bound, position_mode):
    options = SepLLMConfig(
        window_size=100_000, max_separator_tokens=bound, position_mode=position_mode
    )
    assert staging_pages_per_request(options, 32, 1024) <= 5
    assert staging_pages_per_request(options, 32, 40) <= 2, "what there is of pages"


def test_windows_of_whole_pages_copy_no_entry_of_the_stream():
    rng = np.random.default_rng(1)
    policy = KeepRule(3, 64, np.arange(VOCABULARY) == SEPARATOR)
    _, pages, batch = make_batch(policy, [333, 500], [1, 1], 16, rng)
    reads = plan_batch(policy, batch, pages.window, 16).paged
    assert reads.packed is None
    assert set(reads.merged.heads) | set(reads.merged.tails) <= set(pages.window.flat)
