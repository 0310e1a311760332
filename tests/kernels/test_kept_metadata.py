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


def separator_flags() -> torch.Tensor:
    flags = torch.zeros(VOCAB, dtype=torch.bool)
    flags[SEPARATORS] = True
    return flags


class Worker:
    """Requests whose tokens are counted step by step, by the kernel and by the reference."""

    def __init__(self, max_num_reqs: int, ring: int, seed: int = 0, **options) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.options = {"num_sink_tokens": 4, "window_size": 20, "page_size": PAGE, **options}
        shape = (max_num_reqs, ring)
        self.prefix = [torch.full(shape, -999, dtype=torch.int32) for _ in range(2)]
        for prefix in self.prefix:
            prefix[:, 0] = 0

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
            separator_flags(),
        )
        results = []
        for operation, prefix, device in (
            (kept_metadata_reference, self.prefix[0], "cpu"),
            (kept_metadata, self.prefix[1], DEVICE),
        ):
            slots = torch.full((len(flat),), 777, device=device)
            ranges = torch.full((len(flat), 2), 777, dtype=torch.int32, device=device)
            on_device = prefix.to(device)
            inputs = [argument.to(device) for argument in arguments]
            shifts = torch.full((3, len(flat)), 777, dtype=torch.int32, device=device)
            before = on_device.clone()
            operation(*inputs, on_device, slots, ranges, **self.options, shifts=shifts)
            prefix.copy_(on_device)
            results.append((slots.cpu(), ranges.cpu(), shifts.cpu()))
            if operation is kept_metadata:  # the same without shifts
                plain = slots.clone(), ranges.clone()
                operation(*inputs, before, slots.fill_(7), ranges.fill_(7), **self.options)
                assert torch.equal(slots, plain[0])
                assert torch.equal(ranges, plain[1])
                assert torch.equal(before, on_device)
        for found, expected in zip(results[1], results[0], strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(*self.prefix)
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
    for stop in range(chunk, 200 if chunk == 1 else 400, chunk):
        ids = [plain.tokens(chunk) for _ in range(2)]
        ring.rng.set_state(plain.rng.get_state())
        results = [worker.step(ids, [stop, stop], [1, 0]) for worker in (plain, ring)]
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("bound", [None, 7])
def test_counts_are_the_policys(bound):
    """The one definition of what is kept and seen, and of cache positions."""
    config = SepLLMConfig(
        num_sink_tokens=4,
        window_size=20,
        separator_token_ids=tuple(SEPARATORS),
        max_separator_tokens=bound,
    )
    policy = KeepRule.of(config, VOCAB)
    worker = Worker(1, ring=512, max_separator_tokens=bound)
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
