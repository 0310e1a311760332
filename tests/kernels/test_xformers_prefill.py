"""``kept_prefill_xformers`` against the explicit mask.

Its masks are xformers' own; without a GPU, where xformers computes nothing, torch attends under
them in its place.
"""

from dataclasses import replace

import pytest
import torch
from batches import DEVICE, Request, Shape, check_close, dense_attention, make_case
from sepllm_kernels.paged.prefill.triton import kept_prefill_paged
from xformers_masks import attend_under_bias

pytest.importorskip("xformers", reason="xformers is not installed")
from sepllm_kernels.paged.prefill import xformers_window

kept_prefill_xformers = xformers_window.kept_prefill_xformers

pytestmark = pytest.mark.kernels

BF16, F16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
if DEVICE == "cuda":
    from xformers import _cpp_lib

    built_for = _cpp_lib._build_metadata.cuda_version // 100
    if not (torch.version.cuda or "").startswith(f"{built_for}."):
        pytest.skip(f"xformers was built for CUDA {built_for}", allow_module_level=True)
# xformers has no kernel for float32 that gives a log-sum-exp.
DTYPES = [BF16, F16] if DEVICE == "cuda" else [BF16, F16, F32]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    if DEVICE != "cuda":
        monkeypatch.setattr(
            xformers_window, "memory_efficient_attention_partial", attend_under_bias
        )


def requests(sizes, share=0.2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [Request.random(length, count, share, rng) for length, count in sizes]


SIZES = [(40, 1), (170, 100), (200, 130), (90, 90), (33, 2)]


def run_and_check(case, batch=None, first=0):
    output = case.empty_output()
    kept_prefill_xformers(case.queries, case.pages, batch or case.batch, output, case.shape.scale)
    exact, same = dense_attention(case), dense_attention(case, dtype=case.shape.dtype)
    # One rounding more than a kernel that takes both parts: that of the window's result, which is
    # no larger than the largest value.
    largest = max(float(x.abs().max()) for x in case.values if x.numel()) * case.pages.value_scale
    rounding = torch.finfo(case.shape.dtype).eps / 2 * largest
    check_close(case, output[first : case.num_tokens], exact[first:], same[first:], rounding)
    assert output[:first].isnan().all(), "tokens of other requests were written"
    assert output[case.num_tokens :].isnan().all(), "tokens of no request were written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window_size", [1, 17, 64, 1000])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_windows_and_shares(window_size, share, dtype):
    """Also where some tokens see nothing of the stream, or none does."""
    run_and_check(make_case(requests(SIZES, share), window_size, Shape(dtype=dtype)))


@pytest.mark.parametrize("heads", [(4, 4), (8, 1), (6, 2)])
@pytest.mark.parametrize("head_size", [64, 128])
def test_heads(heads, head_size):
    run_and_check(make_case(requests(SIZES), 30, Shape(*heads, head_size=head_size, dtype=BF16)))


def test_padding_and_requests_without_tokens():
    sizes = [(0, 0), (60, 30), (0, 0), (90, 3)]
    run_and_check(make_case(requests(sizes), 20, Shape(dtype=BF16), padding=2))


def test_nothing_to_do():
    case = make_case(requests([(0, 0)]), 20, Shape(dtype=BF16))
    output = torch.full((3, 4, 64), float("nan"))
    kept_prefill_xformers(case.queries, case.pages, case.batch, output, 1.0)
    assert output.isnan().all()


def test_rest_of_a_batch():
    case = make_case(requests([(150, 1), (40, 1), (200, 100), (90, 37)]), 30, Shape(dtype=BF16))
    names = ("seq_lens", "window_table", "kept_table")
    rest = {name: getattr(case.batch, name)[2:] for name in names}
    batch = replace(case.batch, query_start=case.batch.query_start[2:], **rest)
    run_and_check(case, batch, first=2)


def test_fp8_pages():
    case = make_case(requests(SIZES), 40, Shape(dtype=BF16, kv_dtype=FP8))
    run_and_check(replace(case, pages=replace(case.pages, key_scale=0.5, value_scale=3.0)))


@pytest.mark.parametrize("bound", [None, 4])
def test_rotated_queries(bound):
    """As the Triton kernel, which takes both parts, has it."""
    asked = requests(SIZES, 0.4)
    for request in asked:
        request.kept[:3] = True
    case = make_case(asked, 30, Shape(dtype=BF16), max_separators=bound, num_sinks=3)
    queries = torch.stack([case.queries, case.queries.flip(0), -case.queries])
    found, expected = case.empty_output(), case.empty_output()
    kept_prefill_xformers(queries, case.pages, case.batch, found, case.shape.scale)
    kept_prefill_paged(queries, case.pages, case.batch, expected, case.shape.scale)
    # Either rounds to bfloat16 twice at most.
    bound = 3 * torch.finfo(BF16).eps * float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=bound, rtol=0)


def test_a_soft_cap_is_refused():
    case = make_case(requests(SIZES), 30, Shape(dtype=BF16))
    with pytest.raises(ValueError, match=r"logits_soft_cap=30\.0: must be 0"):
        kept_prefill_xformers(case.queries, case.pages, case.batch, case.empty_output(), 1.0, 30.0)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_stream_alone(share):
    """The Triton kernel without a window: a softmax over the stream, and its log-sum-exp."""
    case = make_case(requests(SIZES, share), 30)
    output = case.empty_output()
    sums = torch.full(output.shape[:2], float("nan"), device=DEVICE)
    alone = replace(case.batch, window_size=0)
    kept_prefill_paged(case.queries, case.pages, alone, output, case.shape.scale, log_sums=sums)
    start = 0
    for request, key, value in zip(case.requests, case.keys, case.values, strict=True):
        query = case.queries[start : start + request.num_tokens].cpu().double()
        behind = torch.arange(request.seq_len)[None] <= request.positions[:, None] - 30
        seen = behind & request.kept[None]
        logits = torch.einsum("qhd,khd->hqk", query, key.double().repeat_interleave(2, 1))
        logits = (logits * case.shape.scale).masked_fill(~seen, float("-inf"))
        values = value.double().repeat_interleave(2, 1)
        weights = logits.softmax(-1).nan_to_num()  # of those that see nothing
        expected = torch.einsum("hqk,khd->qhd", weights, values)
        rows = slice(start, start + request.num_tokens)
        torch.testing.assert_close(output[rows].cpu().double(), expected, atol=5e-6, rtol=1e-5)
        expected_sums = logits.logsumexp(-1).T
        torch.testing.assert_close(sums[rows].cpu().double(), expected_sums, atol=5e-6, rtol=1e-5)
        start += request.num_tokens


def test_whether_there_is_a_kernel(monkeypatch):
    """A build for another CUDA raises when it is first called, which is when nobody serves yet."""
    device = torch.device(DEVICE)

    def refuse(*args, **kwargs):
        raise NotImplementedError("No operator found")

    monkeypatch.setattr(xformers_window, "memory_efficient_attention_partial", attend_under_bias)
    assert xformers_window.has_kernel(8, 2, 64, BF16, device)
    monkeypatch.setattr(xformers_window, "memory_efficient_attention_partial", refuse)
    assert not xformers_window.has_kernel(8, 2, 64, BF16, device)
