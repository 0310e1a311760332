"""``kept_decode`` and ``kept_prefill_paged`` against their reference, and that against torch."""

from dataclasses import replace

import pytest
import torch
from batches import Case, Request, Shape, check_close, dense_attention, far_apart, make_case
from sepllm_kernels.paged.decode import (
    kept_attention_reference,
    kept_decode,
    make_plan,
    plan_for,
)
from sepllm_kernels.paged.decode.triton import MERGED, _decode
from sepllm_kernels.paged.prefill.triton import kept_prefill_paged
from sepllm_kernels.paged.tiles import STAGES
from triton.runtime.errors import OutOfResources

pytestmark = pytest.mark.kernels

OPERATIONS = {"decode": kept_decode, "prefill": kept_prefill_paged}
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FP8 = torch.float8_e4m3fn


@pytest.fixture(params=OPERATIONS)
def operation(request):
    return OPERATIONS[request.param]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixed_requests(num_tokens: int = 1, share: float = 0.18, seed: int = 0) -> list[Request]:
    """Of lengths at the edges of pages and tiles, with any number of kept tokens."""
    lengths = [num_tokens, 15 + num_tokens, 64, 65, 16 + num_tokens, 300]
    generator = rng(seed)
    return [Request.random(n, min(num_tokens, n), share, generator) for n in lengths]


def run_and_check(operation, case: Case, soft_cap: float = 0.0) -> torch.Tensor:
    output = case.empty_output()
    operation(case.queries, case.pages, case.batch, output, case.shape.scale, soft_cap)
    exact = dense_attention(case, soft_cap)
    same_dtype = dense_attention(case, soft_cap, case.shape.dtype)
    check_close(case, output[: case.num_tokens], exact, same_dtype)
    assert output[case.num_tokens :].isnan().all(), "tokens of no request were written"
    return output


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("bound", [None, 3])
def test_reference(soft_cap, bound):
    """The reference reads pages, torch the tensors they were made from."""
    requests = mixed_requests(num_tokens=3)
    for request in requests:
        request.kept[:2] = True
    case = make_case(requests, window_size=20, max_separators=bound, num_sinks=2)
    run_and_check(kept_attention_reference, case, soft_cap)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_one_long_request_among_short_ones(monkeypatch, num_tokens):
    """It is cut into more pieces than are merged at a time."""
    monkeypatch.setattr("sepllm_kernels.paged.decode.triton.PROGRAMS", 200)
    requests = mixed_requests(num_tokens)
    requests.insert(2, Request.random(5000, num_tokens, 1.0, rng(3)))
    case = make_case(requests, window_size=70)
    run_and_check(kept_decode, case)
    heads = case.shape.num_kv_heads, case.shape.head_size, case.pages.key.element_size()
    plan = plan_for(len(requests), *heads, case.queries.device)
    lengths = case.batch.query_start, case.batch.seq_lens, case.batch.stream_ranges
    make_plan(*lengths, case.batch.window_size, case.batch.num_sinks, plan)
    assert int(plan.starts[3] - plan.starts[2]) > MERGED


@pytest.mark.parametrize("share", [0.0, 0.18, 1.0])
@pytest.mark.parametrize("window_size", [1, 17, 64, 1000])
def test_windows_and_shares(operation, window_size, share):
    """No kept tokens is a plain window; all kept, or a window over all, is full attention."""
    requests = mixed_requests(share=share)
    run_and_check(operation, make_case(requests, window_size))


@pytest.mark.parametrize("num_tokens", range(1, 9))
def test_query_lengths(operation, num_tokens):
    """As with drafts to be verified."""
    run_and_check(operation, make_case(mixed_requests(num_tokens), window_size=20))


@pytest.mark.parametrize("num_tokens", [63, 64, 65, 200])
@pytest.mark.parametrize("window_size", [1, 100])
def test_chunks(num_tokens, window_size):
    run_and_check(kept_prefill_paged, make_case(mixed_requests(num_tokens), window_size))


def test_mixed_batch():
    """Requests that decode and chunks of prompts in one call."""
    generator = rng(1)
    requests = [
        Request.random(length, count, 0.2, generator)
        for length, count in [(40, 1), (170, 1), (200, 130), (90, 90), (33, 2)]
    ]
    run_and_check(kept_prefill_paged, make_case(requests, window_size=30))


def test_rest_of_a_batch():
    """The requests behind those that decode, given by the rest of the batch's arrays."""
    generator = rng(2)
    sizes = [(150, 1), (40, 1), (200, 100), (90, 37)]
    requests = [Request.random(length, count, 0.2, generator) for length, count in sizes]
    case = make_case(requests, window_size=30)
    batch = case.batch
    rest = replace(
        batch,
        query_start=batch.query_start[2:],
        seq_lens=batch.seq_lens[2:],
        window_table=batch.window_table[2:],
        kept_table=batch.kept_table[2:],
    )
    output = case.empty_output()
    kept_prefill_paged(case.queries, case.pages, rest, output, case.shape.scale)
    assert output[:2].isnan().all()
    exact, same = dense_attention(case), dense_attention(case, dtype=F32)
    check_close(case, output[2:], exact[2:], same[2:])


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 256])
def test_head_sizes_and_dtypes(operation, head_size, dtype):
    shape = Shape(head_size=head_size, dtype=dtype)
    run_and_check(operation, make_case(mixed_requests(2), 40, shape))


@pytest.mark.parametrize("heads", [(1, 1), (8, 1), (6, 2), (7, 7)])
def test_groups_of_heads(operation, heads):
    """Also those that are no power of two."""
    shape = Shape(num_heads=heads[0], num_kv_heads=heads[1])
    run_and_check(operation, make_case(mixed_requests(2), 40, shape))


@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("heads_first", [True, False])
def test_page_sizes(operation, page_size, heads_first):
    shape = Shape(page_size=page_size)
    case = make_case(mixed_requests(2), 40, shape, heads_first=heads_first)
    run_and_check(operation, case)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_fp8_pages(operation, dtype):
    case = make_case(mixed_requests(2), 40, Shape(dtype=dtype, kv_dtype=FP8))
    case = replace(case, pages=replace(case.pages, key_scale=0.5, value_scale=3.0))
    run_and_check(operation, case)


@pytest.mark.parametrize("power", [-40, 0, 20])
def test_fp8_pages_take_queries_of_any_size(operation, power):
    """Also of elements that float16 has no room for: a power of two changes no bit."""
    case = make_case(mixed_requests(2), 40, Shape(dtype=BF16, kv_dtype=FP8))
    expected = run_and_check(operation, case)
    output, factor = case.empty_output(), 2.0**power
    pages, batch, scale = case.pages, case.batch, case.shape.scale / factor
    operation(case.queries * factor, pages, batch, output, scale, 0.0)
    assert torch.equal(output[: case.num_tokens], expected[: case.num_tokens])


@pytest.mark.parametrize("sizes", [(16, 300), (128, 600)])
def test_pages_far_apart(operation, sizes):
    shape = Shape(page_size=sizes[0], dtype=BF16, kv_dtype=FP8)
    case = make_case([Request.random(sizes[1], 2, 0.4, rng())], 40, shape)
    expected = run_and_check(operation, case)
    pages = far_apart(case.pages)
    tables = case.batch.window_table, case.batch.kept_table
    assert max(int(table.max()) for table in tables) * pages.key.stride(0) >= 1 << 31
    assert torch.equal(run_and_check(operation, replace(case, pages=pages)), expected)


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_cap(operation, soft_cap):
    run_and_check(operation, make_case(mixed_requests(2), 40), soft_cap)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_key_that_is_no_number_reaches_the_result(operation, number, monkeypatch):
    """Also where it is in one piece of many: a result without it would look right."""
    monkeypatch.setattr("sepllm_kernels.paged.decode.triton.PROGRAMS", 20)
    case = make_case([Request.random(400, 1, 1.0, rng())], window_size=30)
    page, entry = divmod(100, case.shape.page_size)
    key = case.pages.key[int(case.batch.kept_table[0, page]), 0, entry]
    key[3] = torch.copysign(torch.tensor(number), case.queries[0, 0, 3].cpu())
    output = case.empty_output()
    operation(case.queries, case.pages, case.batch, output, case.shape.scale)
    group = case.shape.num_heads // case.shape.num_kv_heads
    assert output[0, 0].isnan().all()
    assert not output[0, group:].isnan().any()


@pytest.mark.parametrize("padding", [1, 3])
def test_padding(operation, padding):
    """As in a batch padded to the size of a captured graph: nothing of it is computed."""
    run_and_check(operation, make_case(mixed_requests(2), 40, padding=padding))


def test_requests_without_tokens(operation):
    requests = mixed_requests(2)
    for index in (0, 3, 5):
        requests.insert(index, Request(0, 0, torch.zeros(0, dtype=torch.bool)))
    run_and_check(operation, make_case(requests, 40))


@pytest.mark.parametrize("bound", [0, 1, 20, 1000])
def test_bounded_separators(operation, bound):
    """Of those behind the window only the newest are seen, and the sinks."""
    requests = mixed_requests(3, share=0.4)
    for request in requests:
        request.kept[:5] = True
    run_and_check(operation, make_case(requests, 30, max_separators=bound, num_sinks=5))


@pytest.mark.parametrize("bound", [None, 4])
def test_rotated_queries(operation, bound):
    """The window, the stream and the sinks each have queries of their own."""
    requests = mixed_requests(2, share=0.4)
    for request in requests:
        request.kept[:3] = True
    case = make_case(requests, 30, max_separators=bound, num_sinks=3)
    queries = torch.stack([case.queries, case.queries.flip(0), -case.queries])
    found, expected = case.empty_output(), case.empty_output()
    arguments = case.batch, found, case.shape.scale
    operation(queries, case.pages, *arguments)
    kept_attention_reference(queries, case.pages, case.batch, expected, case.shape.scale)
    unrotated = case.empty_output()
    operation(case.queries, case.pages, case.batch, unrotated, case.shape.scale)
    assert not torch.allclose(found, unrotated, atol=1e-2)
    # Both sums of up to 300 terms in float32.
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-5)


def test_queries_between_others(operation):
    """Queries as a slice of one tensor with keys and values, as models hand them over."""
    case = make_case(mixed_requests(2), 40)
    fused = torch.cat([case.queries, torch.full_like(case.queries, float("nan"))], 1)
    queries = fused[:, : case.shape.num_heads]
    assert not queries.is_contiguous()
    run_and_check(operation, replace(case, queries=queries))


def test_launches_that_do_not_fit(operation, monkeypatch):
    """The next one is taken, and remembered; the last one must fit."""
    limit, tried = 0, []

    def run(kernel, *args, grid, warmup, **options):
        if "num_stages" in options:
            tried.append(options["num_stages"])
            if options["num_stages"] > limit:
                raise OutOfResources(200_000, 101_376, "shared memory")
        return original(kernel, *args, grid=grid, warmup=warmup, **options)

    owner = type(_decode)
    original = owner.run
    monkeypatch.setattr(owner, "run", run)
    monkeypatch.setattr("sepllm_kernels.paged.launches._found", {})
    case = make_case(mixed_requests(2), 40)
    with pytest.raises(OutOfResources):
        run_and_check(operation, case)
    limit = STAGES - 1
    tried.clear()
    run_and_check(operation, case)
    assert tried[-1] == limit
    assert set(tried[:-1]) == {STAGES}
    tried.clear()
    run_and_check(operation, case)
    assert tried == [limit]


def test_the_default_type_does_not_matter(operation, monkeypatch):
    """vLLM sets it to the model's while it loads a model."""
    monkeypatch.setattr("sepllm_kernels.paged.decode.triton.PROGRAMS", 20)  # so pieces are merged
    case = make_case(mixed_requests(2), 40, Shape(dtype=BF16))
    expected = run_and_check(operation, case)
    output = case.empty_output()
    torch.set_default_dtype(BF16)
    try:
        operation(case.queries, case.pages, case.batch, output, case.shape.scale)
    finally:
        torch.set_default_dtype(F32)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("page_size", [16, 128])
def test_heads_far_apart(operation, page_size):
    """As where vLLM puts all pages of a head next to each other."""
    shape = Shape(num_kv_heads=4, page_size=page_size, dtype=BF16, kv_dtype=FP8)
    case = make_case(mixed_requests(2), 40, shape)
    pages = far_apart(case.pages, dim=1)
    assert torch.equal(
        run_and_check(operation, replace(case, pages=pages)), run_and_check(operation, case)
    )


@pytest.mark.parametrize("page_size", [48, 80])
def test_pages_of_other_sizes(page_size):
    with pytest.raises(ValueError, match=f"pages of {page_size} entries: must be a power of two"):
        make_case(mixed_requests(2), 40, Shape(page_size=page_size))


def test_too_many_rows():
    case = make_case(mixed_requests(9), 30, Shape(num_heads=8, num_kv_heads=1))
    with pytest.raises(ValueError, match="9 tokens of 8 heads per KV head: at most 64 rows"):
        kept_decode(case.queries, case.pages, case.batch, case.empty_output(), 1.0)


@pytest.mark.parametrize("seed", range(6))
def test_random_batches(operation, seed):
    generator = rng(seed)

    def draw(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    num_tokens = draw(1, 2, 5)
    shape = Shape(
        num_heads=draw(4, 8),
        num_kv_heads=draw(1, 2, 4),
        head_size=draw(64, 80, 128),
        page_size=draw(16, 32),
        dtype=draw(F32, BF16),
    )
    lengths = torch.randint(num_tokens, 500, (draw(1, 3, 7),), generator=generator).tolist()
    share = draw(0.0, 0.1, 0.5, 1.0)
    requests = [Request.random(n, num_tokens, share, generator) for n in lengths]
    window = draw(1, 3, 16, 50, 129, 600)
    run_and_check(operation, make_case(requests, window, shape, padding=draw(0, 2), seed=seed))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="races only show on a GPU")
def test_same_bits_every_time(operation):
    case = make_case(mixed_requests(2), 40, Shape(dtype=BF16))
    first = run_and_check(operation, case)
    for _ in range(20):
        assert torch.equal(first, run_and_check(operation, case))
