from collections.abc import Sequence

import numpy as np
import pytest
import torch
from batches import DEVICE
from sepllm_kernels.kept_metadata import kept_metadata, kept_metadata_reference

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.policy import KeepRule

pytestmark = pytest.mark.kernels

VOCAB = 50
SEPARATORS = [3, 4, 11, 49]
PAGE = 16


def separator_codes() -> torch.Tensor:
    codes = torch.zeros(VOCAB, dtype=torch.uint8)
    codes[SEPARATORS] = 1
    return codes


class Worker:
    """Requests whose tokens are counted step by step, by the kernel and by the reference.

    ``codes`` with spans are given a ring for them.
    """

    def __init__(self, max_num_reqs: int, ring: int, seed: int = 0, codes=None, **options) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.options = {"num_sink_tokens": 4, "window_size": 20, "page_size": PAGE, **options}
        shape = (max_num_reqs, ring)
        self.prefix = [torch.full(shape, -999, dtype=torch.int32) for _ in range(2)]
        for prefix in self.prefix:
            prefix[:, 0] = 0
        self.codes = separator_codes() if codes is None else codes
        self.left = [None, None]
        if codes is not None:
            self.left = [torch.full(shape, 99, dtype=torch.uint8) for _ in range(2)]
            for left in self.left:
                left[:, 0] = 0

    def step(
        self, token_ids: list[torch.Tensor], stops: list[int], rows: list[int], padding: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``token_ids`` of each request end at position ``stops``. Gives slots, ranges, shifts."""
        lengths = [len(ids) for ids in token_ids] + [0] * padding
        flat = torch.cat([*token_ids, torch.full((padding,), SEPARATORS[0])]).int()
        pages = max([*stops, 1]) // PAGE + 1
        table = torch.randint(1, 1000, (len(lengths), pages), generator=self.rng).int()
        arguments = (
            flat,
            torch.tensor([0, *lengths]).cumsum(0).int(),
            torch.tensor([*stops, *[0] * padding]).int(),
            torch.tensor([*rows, *[0] * padding]),
            table,
            self.codes,
        )
        results = []
        for operation, prefix, left, device in (
            (kept_metadata_reference, self.prefix[0], self.left[0], "cpu"),
            (kept_metadata, self.prefix[1], self.left[1], DEVICE),
        ):
            slots = torch.full((len(flat),), 777, device=device)
            ranges = torch.full((len(flat), 2), 777, dtype=torch.int32, device=device)
            on_device = prefix.to(device)
            inputs = [argument.to(device) for argument in arguments]
            shifts = torch.full((3, len(flat)), 777, dtype=torch.int32, device=device)
            before = on_device.clone()
            spans = {"span_left": None if left is None else left.to(device)}
            operation(*inputs, on_device, slots, ranges, **self.options, shifts=shifts, **spans)
            prefix.copy_(on_device)
            if left is not None:
                left.copy_(spans["span_left"])
            results.append((slots.cpu(), ranges.cpu(), shifts.cpu()))
            if operation is kept_metadata:  # the same without shifts
                plain = slots.clone(), ranges.clone()
                again = before, slots.fill_(7), ranges.fill_(7)
                operation(*inputs, *again, **self.options, **spans)
                assert torch.equal(slots, plain[0])
                assert torch.equal(ranges, plain[1])
                assert torch.equal(before, on_device)
        for found, expected in zip(results[1], results[0], strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(*self.prefix)
        if self.left[0] is not None:
            assert torch.equal(*self.left)
        return results[0]

    def tokens(self, count: int) -> torch.Tensor:
        """Some are outside the vocabulary, as placeholders of unknown tokens are."""
        return torch.randint(-2, VOCAB + 2, (count,), generator=self.rng)


def run_requests(worker: Worker, lengths: list[int], chunk: int, padding: int = 0) -> None:
    """All requests, a chunk each per step, and then a few tokens one at a time."""
    done = [0] * len(lengths)
    while done != lengths:
        sizes = [min(chunk, n - d) for n, d in zip(lengths, done, strict=True)]
        done = [d + size for d, size in zip(done, sizes, strict=True)]
        rows = list(range(len(lengths)))[::-1]
        worker.step([worker.tokens(size) for size in sizes], done, rows, padding)


@pytest.mark.parametrize("chunk", [1, 7, 64, 600])
@pytest.mark.parametrize("padding", [0, 2])
def test_chunks(chunk, padding):
    longest = 3 * chunk + 5 if chunk < 600 else 1300
    run_requests(Worker(4, ring=2048), [longest, 1, longest // 2, 20], chunk, padding)


@pytest.mark.parametrize("window_size", [1, 5, 100, 5000])
@pytest.mark.parametrize("num_sink_tokens", [0, 1, 33])
def test_windows_and_sinks(window_size, num_sink_tokens):
    worker = Worker(3, 6000, window_size=window_size, num_sink_tokens=num_sink_tokens)
    run_requests(worker, [200, 90, 3], 40)


@pytest.mark.parametrize("bound", [0, 1, 9, 1000])
def test_bounded_separators(bound):
    run_requests(Worker(3, 512, max_separator_tokens=bound), [300, 90, 3], 40)


def test_interval():
    run_requests(Worker(3, 512, interval=5), [300, 90, 3], 40)


@pytest.mark.parametrize("chunk", [1, 40])
def test_ring(chunk):
    """Only the counts of the window and of the step are held, whatever a request's length."""
    plain, ring = (Worker(2, size, seed=5) for size in (2048, 20 + chunk + 1))
    for stop in range(chunk, 70 if chunk == 1 else 400, chunk):
        ids = [plain.tokens(chunk) for _ in range(2)]
        ring.rng.set_state(plain.rng.get_state())
        results = [worker.step(ids, [stop, stop], [1, 0]) for worker in (plain, ring)]
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)


def span_codes(after: dict[int, int], ends: Sequence[int]) -> torch.Tensor:
    codes = separator_codes()
    for token_id, number in after.items():
        codes[token_id] = 1 | 2 * number
    for token_id in ends:
        codes[token_id] |= 128
    return codes


SPANS = {
    "usual": ({3: 4, 11: 2}, range(20, 26)),
    "long, no ends": ({3: 32}, ()),
    "an end that keeps others": ({3: 5, 4: 9}, (3, 20)),
    "all overlap": ({i: 1 + i % 9 for i in range(VOCAB)}, range(0, VOCAB, 7)),
    "longer than any": ({3: 63}, (20,)),
}


@pytest.mark.parametrize("chunk", [1, 7, 600])
@pytest.mark.parametrize("name", SPANS)
def test_spans(chunk, name):
    """Across steps, and across the tiles of a step."""
    longest = 3 * chunk + 25 if chunk < 600 else 1300
    worker = Worker(3, ring=2048, codes=span_codes(*SPANS[name]), max_separator_tokens=9)
    run_requests(worker, [longest, 1, longest // 2], chunk, padding=2)


def test_spans_without_any_keep_what_ids_alone_keep():
    plain, spans = Worker(2, 512), Worker(2, 512, codes=span_codes({}, [3, 20]))
    for stop in (40, 41, 100):
        ids = [plain.tokens(stop - {40: 0, 41: 40, 100: 41}[stop]) for _ in range(2)]
        spans.rng.set_state(plain.rng.get_state())
        results = [worker.step(ids, [stop, stop], [0, 1]) for worker in (plain, spans)]
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SPANS)
def test_spans_that_are_computed_again(name):
    """What is left before a rejected draft is still known when other tokens take its place."""
    worker = Worker(1, ring=20 + 9 + 5 + 1, codes=span_codes(*SPANS[name]))
    stop = 0
    for length, rejected in ((5, 0), (9, 5), (9, 0), (9, 4), (9, 2), (9, 5)):
        worker.step([worker.tokens(length)], [stop + length], [0])
        stop += length - rejected


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize("bound", [None, 7])
def test_counts_are_the_policys(bound, spans):
    """The one definition of what is kept and seen, and of cache positions."""
    config = SepLLMConfig(
        num_sink_tokens=4,
        window_size=20,
        separator_token_ids=tuple(SEPARATORS),
        max_separator_tokens=bound,
        keep=("separators", 30, 31),
        keep_after=((9, (30,)), (2, (31,))) if spans else (),
        **({"segment_ends": (3, 31, 40)} if spans else {}),
    )
    config = config.with_kept_ids(config.kept_ids, *config.resolved_spans)
    policy = KeepRule.of(config, VOCAB)
    codes = torch.from_numpy(policy.token_codes.copy())
    worker = Worker(1, 512, codes=codes, max_separator_tokens=bound)
    ids = worker.tokens(300)
    slots, ranges, shifts = worker.step([ids], [300], [0])
    kept = policy.kept_flags(ids.numpy())
    prefix = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    assert (worker.prefix[1][0, :301].numpy() == prefix).all()
    assert ((slots >= 0).numpy() == kept).all()
    position = np.arange(300)
    limits = policy.stream_limit(prefix, position)
    assert (ranges[:, 1].numpy() == limits).all()
    assert (ranges[:, 0].numpy() == policy.seen.first_entries(limits)).all()
    assert (shifts[0].numpy() == np.where(kept, position - prefix[:-1], 0)).all()
    assert (shifts[1].numpy() == policy.stream_shift(limits, position)).all()
    assert (shifts[2].numpy() == policy.sink_shift(limits, position)).all()


def test_what_is_computed_again_is_counted_again():
    """A rejected draft, or a request that was preempted."""
    worker = Worker(1, ring=512)
    separators = torch.full((30,), SEPARATORS[0])
    worker.step([separators], [30], [0])
    worker.step([torch.zeros(10, dtype=torch.long)], [25], [0])
    assert worker.prefix[1][0, 25] == 15
