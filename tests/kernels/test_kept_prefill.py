import pytest
import torch
from sepllm_kernels.sequence.prefill import kept_prefill, kept_prefill_reference
from sepllm_kernels.sequence.prefill.torch_sdpa import BLOCK_ROWS, block_mask

pytestmark = pytest.mark.kernels

NAN = float("nan")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: waking a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_limits(kind: str, num_rows: int, num_stream: int, rng: torch.Generator) -> torch.Tensor:
    if kind == "zero":
        return torch.zeros(num_rows, dtype=torch.int32)
    if kind == "equal":
        return torch.full((num_rows,), num_stream, dtype=torch.int32)
    if kind == "staircase":  # one more entry every few rows, up to all of them
        steps = torch.arange(1, num_rows + 1) * num_stream // num_rows
        return steps.to(torch.int32)
    if kind == "late":  # nothing until the last row
        limits = torch.zeros(num_rows, dtype=torch.int32)
        limits[-1] = num_stream
        return limits
    assert kind == "random"
    return torch.randint(0, num_stream + 1, (num_rows,), generator=rng).sort().values.int()


def make_inputs(
    num_rows: int,
    num_before: int,
    num_stream: int,
    limits: str,
    window_size: int,
    heads: tuple[int, int] = (2, 1),
    head_size: int = 32,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple:
    """Arguments of the operation; what no row may read is NaN."""
    rng = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    # Poison after the stream, as in a page that is not filled yet, and before the window.
    stream = torch.randn(2, num_kv_heads, num_stream + 3, head_size, generator=rng)
    window = torch.randn(2, num_kv_heads, num_before + num_rows, head_size, generator=rng)
    stream_limits = make_limits(limits, num_rows, num_stream, rng)
    stream[:, :, int(stream_limits[-1]) :] = NAN
    window[:, :, : max(0, num_before - window_size + 1)] = NAN
    query = torch.randn(num_rows, num_heads, head_size, generator=rng)
    stream, window = stream.to(dtype), window.to(dtype)
    return query.to(dtype), *stream, *window, stream_limits, window_size, head_size**-0.5


def eager(
    query, stream_key, stream_value, window_key, window_value, limits, window_size, scale, soft_cap
):
    """Plain torch over the whole mask in the inputs' own dtype: what rounding alone costs."""
    num_rows, num_heads, _ = query.shape
    num_stream, num_window = stream_key.shape[1], window_key.shape[1]
    own = torch.arange(num_window - num_rows, num_window)[:, None]
    entry = torch.arange(num_window)
    mask = torch.cat(
        [
            torch.arange(num_stream) < limits[:, None],
            (entry <= own) & (entry > own - window_size),
        ],
        dim=1,
    )
    group = num_heads // stream_key.shape[0]
    key = torch.cat([stream_key, window_key], 1).nan_to_num().repeat_interleave(group, 0)
    value = torch.cat([stream_value, window_value], 1).nan_to_num().repeat_interleave(group, 0)
    logits = query.transpose(0, 1) @ key.mT * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ value).transpose(0, 1)


def check(inputs: tuple, soft_cap: float = 0.0, masks: dict | None = None) -> torch.Tensor:
    """Compare with the reference.

    The operation may be off the true result (float64) by twice what plain torch is off in the same
    dtype, and the reference is off by its own float32 rounding; eps is one rounding of the output.
    """
    out = kept_prefill(*inputs, soft_cap, masks)
    expected = kept_prefill_reference(*inputs, soft_cap)
    assert out.shape == inputs[0].shape
    assert out.dtype == inputs[0].dtype
    assert expected.isfinite().all()
    true = eager(*(x.double() for x in inputs[:5]), *inputs[5:], soft_cap)
    torch.testing.assert_close(expected.double(), true, rtol=1e-4, atol=1e-5)
    plain = (eager(*inputs, soft_cap).double() - true).abs().max()
    own = (expected.double() - true).abs().max()
    bound = 2 * plain + own + torch.finfo(out.dtype).eps * max(1.0, float(true.abs().max()))
    error = (out.double() - expected.double()).abs().max()
    assert error <= bound, f"error {error:.3g} above {bound:.3g}"
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limits", ["zero", "equal", "staircase", "late", "random"])
@pytest.mark.parametrize("window_size", [1, 33, 10_000])
@pytest.mark.parametrize("num_rows", [1, 300])
def test_limits_and_windows(num_rows, window_size, limits, dtype):
    check(make_inputs(num_rows, 70, 45, limits, window_size, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 255, 256, 257, 600])
def test_rows_around_the_block_size(num_rows, dtype):
    assert BLOCK_ROWS == 256, "the row counts of this test surround the block size"
    check(make_inputs(num_rows, 19, 90, "staircase", 64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", [32, 64, 80])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1), (8, 2)], ids=str)
def test_heads(heads, head_size, dtype):
    inputs = make_inputs(37, 50, 21, "random", 16, heads=heads, head_size=head_size, dtype=dtype)
    check(inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
@pytest.mark.parametrize("num_rows", [1, 280])
def test_soft_cap(num_rows, soft_cap, dtype):
    inputs = make_inputs(num_rows, 10, 30, "random", 20, heads=(4, 2), dtype=dtype)
    capped = check(inputs, soft_cap)
    if soft_cap == 0.5:  # the cap must show
        assert not torch.allclose(capped.float(), kept_prefill(*inputs).float(), atol=0.05)


@pytest.mark.parametrize("num_before", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("num_rows", [1, 20])
def test_window_entries_before_the_rows(num_rows, num_before):
    check(make_inputs(num_rows, num_before, 12, "random", 64))


@pytest.mark.parametrize("num_rows", [1, 257])
def test_no_stream_at_all(num_rows):
    query, _, _, window_key, window_value, limits, *sizes = make_inputs(num_rows, 9, 0, "zero", 8)
    empty = window_key[:, :0]
    check((query, empty, empty, window_key, window_value, limits, *sizes))


@pytest.mark.parametrize("seed", range(25))
def test_random_shapes(seed):
    rng = torch.Generator().manual_seed(1000 + seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=rng))

    kinds = ["zero", "equal", "staircase", "late", "random"]
    inputs = make_inputs(
        num_rows=draw(1, 300),
        num_before=draw(0, 90),
        num_stream=draw(0, 120),
        limits=kinds[draw(0, 4)],
        window_size=draw(1, 200),
        heads=((2, 2), (2, 1), (4, 1))[draw(0, 2)],
        head_size=(32, 64, 80)[draw(0, 2)],
        dtype=(torch.float32, torch.bfloat16)[draw(0, 1)],
        seed=seed,
    )
    check(inputs, soft_cap=(0.0, 0.0, 2.0)[draw(0, 2)])


def test_window_over_everything_is_causal_attention():
    inputs = make_inputs(300, 40, 0, "zero", 340, heads=(4, 2))
    query, _, _, key, value, *_, scale = inputs
    mask = torch.ones(300, 340, dtype=torch.bool).tril(40)
    q, k, v = query.transpose(0, 1), key.repeat_interleave(2, 0), value.repeat_interleave(2, 0)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    torch.testing.assert_close(kept_prefill(*inputs), dense.transpose(0, 1))


def test_window_of_one_without_stream_is_the_own_value():
    inputs = make_inputs(270, 5, 0, "zero", 1)
    own = inputs[4][:, 5:].transpose(0, 1).expand(270, 2, 32)
    torch.testing.assert_close(kept_prefill(*inputs), own)


@pytest.mark.parametrize("cut", [1, 100, 256, 299])
def test_chunks_equal_the_whole(cut):
    query, sk, sv, wk, wv, limits, window_size, scale = make_inputs(300, 20, 50, "random", 40)
    whole = kept_prefill(query, sk, sv, wk, wv, limits, window_size, scale)
    split = wk.shape[1] - 300 + cut
    args = window_size, scale
    first = kept_prefill(query[:cut], sk, sv, wk[:, :split], wv[:, :split], limits[:cut], *args)
    second = kept_prefill(query[cut:], sk, sv, wk, wv, limits[cut:], *args)
    torch.testing.assert_close(torch.cat([first, second]), whole)


def test_inputs_are_left_alone():
    inputs = make_inputs(300, 20, 50, "random", 40)
    before = [x.clone() for x in inputs[:6]]
    kept_prefill(*inputs)
    for old, new in zip(before, inputs[:6], strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


def test_masks_are_kept_and_reused():
    inputs = make_inputs(600, 20, 50, "staircase", 40)
    masks: dict[int, torch.Tensor] = {}
    first = check(inputs, masks=masks)
    # The first block's windows differ in size; two tiles of 32 rows leave 24 of the last 88.
    assert sorted(masks) == [0, 256, 512, 576]
    assert [len(mask) for _, mask in sorted(masks.items())] == [256, 256, 64, 24]
    assert all(mask.dtype is torch.bool for mask in masks.values()), "a byte for each pair"
    made = dict(masks)
    rng = torch.Generator().manual_seed(41)
    other_layer = (torch.randn(inputs[0].shape, generator=rng), *inputs[1:])
    check(other_layer, masks=masks)
    assert all(masks[key] is mask for key, mask in made.items())
    assert torch.equal(kept_prefill(*inputs, masks=masks), first)
    # A mask passed in decides what is seen, so it is used and not made again.
    masks[0] = torch.zeros_like(masks[0])
    masks[0][:, -1] = True
    changed = kept_prefill(*inputs, masks=masks)
    assert not torch.allclose(changed[:256], first[:256])
    assert torch.equal(changed[256:], first[256:])


def test_block_mask_by_hand():
    mask = block_mask(torch.tensor([0, 2]), torch.arange(2), num_window=4, window_size=2)
    assert mask.int().tolist() == [[0, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1]]
    # One sink and, of entries 3 to 6, those from a row's start on.
    entries, starts = torch.tensor([0, 3, 4, 5, 6]), torch.tensor([3, 5])
    mask = block_mask(torch.tensor([5, 7]), entries, 2, 1, starts, num_sinks=1)
    assert mask.int().tolist() == [[1, 1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0, 1]]
    # Two tiles of one row, each of which ends its own window.
    mask = block_mask(torch.tensor([0, 2]), torch.arange(2), 3, window_size=2, num_tiles=2)
    assert mask.int().tolist() == [[0, 0, 0, 1, 1], [1, 1, 0, 1, 1]]


@pytest.mark.parametrize("num_rows", [1, 20, 300])
@pytest.mark.parametrize("limits", ["zero", "staircase", "late", "random"])
@pytest.mark.parametrize(("sinks", "bound"), [(0, 1), (3, 5), (3, 1000), (200, 5)])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_bounded_stream(num_rows, limits, sinks, bound, soft_cap):
    """Sinks and the newest entries; what lies between is NaN, as if it had been given away."""
    inputs = list(make_inputs(num_rows, 40, 120, limits, 33))
    stream_limits = inputs[5]
    starts = torch.maximum(stream_limits.clamp(max=sinks), stream_limits - bound)
    for stream in inputs[1:3]:
        stream[:, min(sinks, 120) : int(starts[0])] = NAN
    given = {"stream_starts": starts, "num_sinks": sinks}
    out = kept_prefill(*inputs, soft_cap, **given)
    expected = kept_prefill_reference(*inputs, soft_cap, **given)
    assert expected.isfinite().all()
    # Sums of up to 160 terms in float32, in another order.
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)
    masks: dict[int, torch.Tensor] = {}
    for _ in range(2):
        assert torch.equal(kept_prefill(*inputs, soft_cap, masks, **given), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 20, 300])
@pytest.mark.parametrize("limits", ["zero", "staircase", "late", "random"])
@pytest.mark.parametrize(("sinks", "bound"), [(0, None), (0, 1), (3, 5), (3, 1000), (200, 5)])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_a_query_for_each_part(num_rows, limits, sinks, bound, soft_cap, dtype):
    """As cache positions need; each part has a query of its own here, not only another angle."""
    inputs = list(make_inputs(num_rows, 40, 120, limits, 33, heads=(4, 2), dtype=dtype))
    stream_limits = inputs[5]
    given = {}
    rng = torch.Generator().manual_seed(1)
    for name in ("stream_query", "sink_query") if bound is not None else ("stream_query",):
        given[name] = torch.randn(inputs[0].shape, generator=rng).to(dtype)
    if bound is not None:
        starts = torch.maximum(stream_limits.clamp(max=sinks), stream_limits - bound)
        given |= {"stream_starts": starts, "num_sinks": sinks}
        for stream in inputs[1:3]:
            stream[:, min(sinks, 120) : int(starts[0])] = NAN
    out = kept_prefill(*inputs, soft_cap, **given)
    expected = kept_prefill_reference(*inputs, soft_cap, **given)
    assert out.dtype == dtype
    assert expected.isfinite().all()
    if dtype == torch.float32:  # sums of up to 160 terms, in another order
        torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-6)
    else:
        # Weights and each of up to three parts are rounded to 8 bits, and so is their sum.
        largest = max(float(x.nan_to_num().abs().max()) for x in (inputs[2], inputs[4]))
        assert (out.float() - expected).abs().max() <= 3 * largest * torch.finfo(dtype).eps / 2
    if int(stream_limits[-1]) > sinks:
        same = kept_prefill(*inputs, soft_cap, **{**given, "stream_query": None})
        assert not torch.equal(same, out)
    masks: dict[int, torch.Tensor] = {}
    for _ in range(2):
        assert torch.equal(kept_prefill(*inputs, soft_cap, masks, **given), out)


@pytest.mark.parametrize("num_rows", [7, 300])
def test_a_bound_of_everything_is_none(num_rows):
    inputs = make_inputs(num_rows, 40, 120, "staircase", 33)
    starts = inputs[5].clamp(max=4)
    bounded = kept_prefill(*inputs, stream_starts=starts, num_sinks=4)
    assert torch.equal(bounded, kept_prefill(*inputs))
