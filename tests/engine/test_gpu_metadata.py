"""Counting on the device, and the metadata that CUDA graphs are replayed with."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_sepllm.engine.device_rows import DeviceRows, DeviceRunnerTokens
from vllm_sepllm.policy import (
    FixedIntervalPolicy,
    KeptPolicy,
    SepLLMPolicy,
    StreamingPolicy,
    separator_table,
)

pytestmark = pytest.mark.engine

VOCABULARY, SINKS, WINDOW, PAGE = 10, 2, 6, 16
POLICIES = {
    "sepllm": SepLLMPolicy(SINKS, WINDOW, separator_table([0, 3], VOCABULARY)),
    "streaming": StreamingPolicy(SINKS, WINDOW),
    "fixed_interval": FixedIntervalPolicy(SINKS, WINDOW, 4),
    "bounded": SepLLMPolicy(
        SINKS, WINDOW, separator_table([0, 3], VOCABULARY), max_separator_tokens=4
    ),
}
CPU = torch.device("cpu")


def make_rows(policy=POLICIES["sepllm"], max_step=16, rejected=3, max_len=500):
    return DeviceRows(policy, 4, max_len, max_step, rejected, CPU)


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
    policy, rows = POLICIES[name], make_rows(POLICIES[name])
    ids = rng.integers(0, VOCABULARY, 200)
    rows.restart(1, ids[:0])
    for start in range(0, 200, 16):
        check(rows, 1, ids[: start + 16], start, policy)


def test_an_unknown_policy_is_refused():
    class Other(KeptPolicy, name="other"):
        def chosen(self, token_ids, positions):
            return np.zeros(len(positions), dtype=np.bool_)

    try:
        with pytest.raises(ValueError, match="Other is not known to the Triton kernel"):
            make_rows(Other(SINKS, WINDOW))
    finally:
        del KeptPolicy.registered["other"]


@pytest.mark.parametrize("computed", [0, 1, 5, 30, 130])
def test_a_request_resumes_anywhere(computed):
    """After a prefix hit or a preemption, whatever the row held before."""
    rng = np.random.default_rng(1)
    rows = make_rows()
    check(rows, 2, rng.integers(0, VOCABULARY, 14), 0)
    ids = rng.integers(0, VOCABULARY, 140)
    rows.restart(2, ids[:computed])
    check(rows, 2, ids[: computed + 10], computed)


def test_memory_does_not_grow_with_length():
    short, long = (make_rows(max_len=n)._kept_prefix.numel() for n in (1000, 1_000_000))
    assert short == long == 4 * (WINDOW + 16 + 3 + 1)


class Runner:
    """The V1 runner, as far as token ids are read from it."""

    def __init__(self):
        self.requests = {}
        self.input_batch = SimpleNamespace(
            req_ids=[],
            num_computed_tokens_cpu=np.zeros(4, dtype=np.int32),
            token_ids_cpu=np.zeros((4, 500), dtype=np.int32),
        )
        self.query_start_loc = SimpleNamespace(np=np.zeros(5, dtype=np.int32))
        self.input_ids = SimpleNamespace(gpu=torch.zeros(64, dtype=torch.int32))

    def schedule(self, **requests):
        """Each request's ids, and of them those computed before."""
        batch = self.input_batch
        batch.req_ids = list(requests)
        for i, (name, (ids, start)) in enumerate(requests.items()):
            self.requests.setdefault(name, object())
            batch.num_computed_tokens_cpu[i] = start
            batch.token_ids_cpu[i, : len(ids)] = ids
            first = self.query_start_loc.np[i]
            self.query_start_loc.np[i + 1] = first + len(ids) - start
            self.input_ids.gpu[first : first + len(ids) - start] = torch.tensor(ids[start:])


@pytest.mark.parametrize("resumes_at", [0, 7, 32, 48])
def test_v1_finds_out_when_a_request_resumes(resumes_at):
    """The request keeps its name and its row; only where it starts tells."""
    rng = np.random.default_rng(3)
    runner, rows = Runner(), make_rows()
    tokens = DeviceRunnerTokens(rows, runner)
    ids = rng.integers(0, VOCABULARY, 100)
    for start in range(0, 80, 16):
        runner.schedule(a=(ids[: start + 16], start))
        _, [row] = tokens.step()
        check(rows, int(row), ids[: start + 16], start)
    runner.schedule(a=(ids[: resumes_at + 10], resumes_at))
    _, [row] = tokens.step()
    check(rows, int(row), ids[: resumes_at + 10], resumes_at)


def test_v1_counts_rejected_drafts_again():
    rng = np.random.default_rng(4)
    runner, rows = Runner(), make_rows()
    tokens = DeviceRunnerTokens(rows, runner)
    ids = rng.integers(0, VOCABULARY, 60)
    start = 0
    for accepted in (16, 1, 3, 4, 1, 2, 4, 4, 1):
        stop = start + (16 if start == 0 else 4)
        wrong = np.concatenate([ids[: start + accepted], np.zeros(99, dtype=ids.dtype)])[:stop]
        runner.schedule(a=(wrong, start))
        _, [row] = tokens.step()
        check(rows, int(row), wrong, start)
        start += accepted


def test_v1_leaves_requests_alone_in_a_dummy_run():
    runner = Runner()
    tokens = DeviceRunnerTokens(make_rows(), runner)
    assert tokens.step() is None  # no request yet, as in a warm-up
    runner.schedule(a=(np.arange(5), 0))
    tokens.is_dummy_run = True
    assert tokens.step() is None
    tokens.is_dummy_run = False
    assert tokens.step() is not None


class Tokens:
    def __init__(self, rows, ids, index):
        self.rows, self._given = rows, (ids, index)

    def step(self):
        return self._given


@pytest.fixture(scope="module")
def builder():
    from helpers import MODEL
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sepllm.engine.gpu_metadata import GPUKeptMetadataBuilder
    from vllm_sepllm.engine.spec import KeptSpec

    config = EngineArgs(
        MODEL,
        max_model_len=512,
        max_num_batched_tokens=64,
        attention_backend="sepllm",
        additional_config={"sepllm": {"window_size": WINDOW, "num_sink_tokens": SINKS}},
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2},
    ).create_engine_config()
    spec = KeptSpec(
        block_size=PAGE,
        num_kv_heads=1,
        head_size=32,
        dtype=torch.float32,
        window_size=WINDOW,
        num_sink_tokens=SINKS,
        expected_kept_share=0.2,
    )
    return GPUKeptMetadataBuilder(spec, ["layer"], config, CPU)


def common(lengths, stops, padding=0):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    lengths, stops = [*lengths, *[0] * padding], [*stops, *[0] * padding]
    start = torch.tensor([0, *lengths]).cumsum(0).int()
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=torch.tensor(stops).int(),
        num_reqs=len(lengths),
        num_actual_tokens=int(start[-1]) + padding,
        max_query_len=max(lengths),
        max_seq_len=max(stops),
        block_table_tensor=torch.ones(len(lengths), 40, dtype=torch.int32),
        slot_mapping=torch.zeros(int(start[-1]) + padding, dtype=torch.int64),
    )


def test_decodes_come_first(builder):
    """Up to the drafts to be verified and one more; the rest are chunks of prompts."""
    batch = common([1, 4, 4, 5, 20], [30, 40, 9, 5, 50])
    rows = make_rows(max_step=64)
    for row, count in enumerate([29, 36, 5, 0, 30]):
        rows.restart(row % 4, np.zeros(count, dtype=np.int32))
    tokens = Tokens(rows, torch.zeros(34, dtype=torch.int32), torch.arange(5) % 4)
    found = builder.build(0, batch, tokens=tokens)
    assert (found.num_decodes, found.num_decode_tokens, found.num_reqs) == (3, 9, 5)
    assert (found.max_decode_query_len, found.max_query_len) == (4, 20)


def test_graphs_find_everything_where_it_was(builder):
    """Buffers are the same in every step; what is padding is written and seen by nobody."""
    rows = make_rows(max_step=64)
    tokens = Tokens(rows, torch.zeros(64, dtype=torch.int32), torch.tensor([0, 1]))
    first = builder.build(0, common([1, 1], [1, 1], padding=2), tokens=tokens)
    kept = [1, 1]  # the first token is a sink
    assert (first.stream_slots >= 0).tolist() == [*map(bool, kept), False, False]
    assert not first.stream_ranges[2:].any()
    again = builder.build(0, common([1], [2], padding=3), tokens=tokens)
    assert again.stream_slots.data_ptr() == first.stream_slots.data_ptr()
    assert again.stream_ranges.data_ptr() == first.stream_ranges.data_ptr()
    assert (again.stream_slots >= 0).tolist() == [True, False, False, False]


def test_a_batch_of_vllms_own_making_is_written_nowhere(builder):
    """As those that graphs are captured from, and steps taken for other replicas."""
    builder._slots.fill_(7)
    builder._ranges.fill_(7)
    for tokens in (None, Tokens(make_rows(), None, None)):
        if tokens is not None:
            tokens._given = None
        found = builder.build(0, common([4, 4], [512, 512]), tokens=tokens)
        assert (found.stream_slots == -1).all()
        assert not found.stream_ranges.any()
        assert found.num_decodes == 2
