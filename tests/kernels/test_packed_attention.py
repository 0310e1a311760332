"""``packed_attention`` and its gradients against torch under an explicit mask, in float64."""

import math

import pytest
import torch
from batches import DEVICE
from sepllm_kernels.sequence.packed import (
    PackedPlan,
    check_gpu_has_kernels,
    flex,
    packed_attention,
    packed_attention_reference,
    packed_attention_torch,
)
from sepllm_kernels.sequence.packed.torch_sdpa import PART, part_biases
from sepllm_kernels.sequence.packed.triton import KEY_GRADIENT, packed_attention_triton

pytestmark = pytest.mark.kernels

HEADS = ((4, 4, 16), (6, 2, 16), (8, 1, 32))  # heads, KV heads, head size


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: waking a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def whole(low: int, high: int, rng: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=rng))


def random_text(rng: torch.Generator) -> dict[str, torch.Tensor]:
    """One text's plan, written down from its definition: window, sinks, and a bound or none."""
    num_tokens, window = whole(1, 400, rng), whole(1, 150, rng)
    share, num_sinks = float(torch.rand(1, generator=rng)), whole(0, 5, rng)
    bound = whole(1, 40, rng) if whole(0, 1, rng) else None
    is_kept = torch.rand(num_tokens, generator=rng) < share * share
    is_kept[:num_sinks] = True
    place = torch.arange(num_tokens)
    first = (place - window + 1).clamp(min=0)
    prefix = torch.cat([torch.zeros(1, dtype=torch.long), is_kept.cumsum(0)])
    limit = prefix[first]
    sink_limit = limit.clamp(max=num_sinks) if bound else torch.zeros_like(limit)
    low = torch.maximum(sink_limit, limit - bound) if bound else torch.zeros_like(limit)
    nothing = torch.zeros_like(limit)
    return {
        "kept": is_kept.nonzero()[:, 0],
        "window_first": first,
        "stream": torch.stack([low, limit]),
        "sinks": torch.stack([nothing, sink_limit]),
    }


def random_plan(rng: torch.Generator) -> PackedPlan:
    """Some texts one behind the other."""
    return joined_plan([random_text(rng) for _ in range(whole(1, 4, rng))])


def joined_plan(texts: list[dict[str, torch.Tensor]]) -> PackedPlan:
    """Texts one behind the other."""
    parts, num_tokens, num_kept = [], 0, 0
    for text in texts:
        shifts = {"kept": num_tokens, "window_first": num_tokens}
        parts.append({name: part + shifts.get(name, num_kept) for name, part in text.items()})
        num_tokens += text["window_first"].shape[0]
        num_kept += text["kept"].shape[0]
    joined = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
    sinks = joined["sinks"].int()
    has_sinks = bool((sinks[1] > sinks[0]).any())
    return PackedPlan(
        joined["kept"],
        joined["window_first"].int(),
        joined["stream"].int(),
        sinks if has_sinks else None,
    )


def inputs(plan: PackedPlan, heads: tuple[int, int, int], seed: int) -> list[torch.Tensor]:
    num_heads, num_kv_heads, size = heads
    rng = torch.Generator().manual_seed(seed)
    shapes = ((num_heads, size), (num_kv_heads, size), (num_kv_heads, size), (num_heads, size))
    made = [
        torch.randn(plan.num_tokens, *shape, generator=rng, dtype=torch.float64) for shape in shapes
    ]
    return [*(tensor.requires_grad_() for tensor in made[:3]), made[3]]


def masked(query, key, value, mask, scale):
    """torch under an explicit mask."""
    group = query.shape[1] // key.shape[1]
    logits = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * scale
    weights = logits.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(group, 1))


def fused(query, key, value, mask, scale):
    """The same as torch computes it in one operation, which rounds as ours does."""
    group = query.shape[1] // key.shape[1]
    bias = query.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
    heads = query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    given = [each.transpose(0, 1)[None] for each in heads]
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*given, attn_mask=bias, scale=scale)[0].transpose(0, 1)


def passes(function, given, *arguments):
    """Result and gradients."""
    *tensors, grad = given
    output = function(*tensors, *arguments)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad)]


def furthest(found, wanted) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_both_passes(seed):
    plan = random_plan(torch.Generator().manual_seed(seed))
    plan.check()
    given = inputs(plan, HEADS[seed % 3], seed)
    found = passes(packed_attention, given, plan, 0.3)
    assert furthest(found, passes(masked, given, plan.mask(), 0.3)) < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_the_reference(seed):
    plan = random_plan(torch.Generator().manual_seed(100 + seed))
    given = inputs(plan, HEADS[seed], seed)
    found = passes(packed_attention_reference, given, plan, 0.3)
    assert furthest(found, passes(masked, given, plan.mask(), 0.3)) < 1e-10


def test_the_comparison_can_fail():
    """A window too short by one token is seen."""
    plan = random_plan(torch.Generator().manual_seed(3))
    given = inputs(plan, HEADS[0], 3)
    mask = plan.mask()
    own = torch.arange(plan.num_tokens)
    mask[own, plan.window_first.long()] &= own == plan.window_first
    found = passes(packed_attention, given, plan, 0.3)
    assert furthest(found, passes(masked, given, mask, 0.3)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype):
    """No further from float64 than twice what torch is in the same type under the mask."""
    plan = random_plan(torch.Generator().manual_seed(5))
    check_type(packed_attention_torch, plan, HEADS[1], dtype)


def test_tensors_as_models_have_them():
    """Heads of queries lie apart, and the gradient that comes is of any layout."""
    plan = random_plan(torch.Generator().manual_seed(7))
    *tensors, grad = inputs(plan, HEADS[1], 7)
    apart = [t.detach().transpose(0, 1).contiguous().requires_grad_() for t in tensors]
    output = packed_attention(*(t.transpose(0, 1) for t in apart), plan, 0.3)
    output.sum().backward()  # a gradient of strides 0
    wanted = passes(masked, [*tensors, torch.ones_like(grad)], plan.mask(), 0.3)
    found = [output.detach(), *(t.grad.transpose(0, 1) for t in apart)]
    assert furthest(found, wanted) < 1e-10


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
def test_tensors_of_any_layout(order):
    """Elements of a head lie apart."""
    plan = random_plan(torch.Generator().manual_seed(8))
    *tensors, grad = inputs(plan, HEADS[1], 8)
    wanted = passes(masked, [*tensors, grad], plan.mask(), 0.3)
    back = [order.index(axis) for axis in range(3)]
    apart = [t.detach().permute(order).contiguous().permute(back) for t in (*tensors, grad)]
    assert all(t.stride(2) != 1 for t in apart)
    found = passes(
        packed_attention, [*(t.requires_grad_() for t in apart[:3]), apart[3]], plan, 0.3
    )
    assert furthest(found, wanted) < 1e-10


@pytest.mark.parametrize("seed", range(4))
def test_flex_attention(seed):
    """The same result; each block that holds a visible pair is listed, and full ones hold nothing
    else. Others are listed only for queries of several texts."""
    plan = random_plan(torch.Generator().manual_seed(300 + seed))
    blocks = flex.block_mask(plan)
    num_stream = flex.padded_stream(plan)
    query = torch.arange(plan.num_tokens)[:, None]
    mask = flex.mask_function(plan)(0, 0, query, torch.arange(num_stream + plan.num_tokens))
    wanted = torch.zeros(plan.num_tokens, plan.num_tokens, dtype=torch.bool)
    wanted[:, plan.kept] |= mask[:, : len(plan.kept)]
    assert torch.equal(wanted | mask[:, num_stream:], plan.mask())
    sizes = [-(-size // flex.BLOCK) * flex.BLOCK for size in mask.shape]
    padded = torch.zeros(*sizes, dtype=torch.bool)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    tiles = padded.unflatten(1, (-1, flex.BLOCK)).unflatten(0, (-1, flex.BLOCK))
    held = tiles.sum((1, 3))
    full, partial = torch.zeros_like(held), torch.zeros_like(held)
    for listed, counts, indices in (
        (partial, blocks.kv_num_blocks, blocks.kv_indices),
        (full, blocks.full_kv_num_blocks, blocks.full_kv_indices),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            listed[row, indices[0, 0, row, :count].long()] = 1
    rows = tiles.shape[1] * torch.ones(len(held), 1, dtype=torch.long)
    rows[-1] = plan.num_tokens - flex.BLOCK * (len(held) - 1)
    assert not (full * partial).any()
    assert (held[full == 1] == (rows * flex.BLOCK).expand_as(held)[full == 1]).all()
    assert (full + partial)[held > 0].all()
    begins = torch.cat([plan.mask().sum(1) == 1, torch.zeros(flex.BLOCK, dtype=torch.bool)])
    several = begins[: len(held) * flex.BLOCK].reshape(-1, flex.BLOCK)[:, 1:].any(1)
    assert torch.equal((full + partial)[~several] > 0, held[~several] > 0)
    assert not several.all()
    given = [tensor.detach() for tensor in inputs(plan, HEADS[seed % 3], seed)[:3]]
    found = flex.packed_attention_flex(*given, plan, 0.3)
    assert furthest([found], [masked(*given, plan.mask(), 0.3)]) < 1e-10


@pytest.mark.skipif(DEVICE == "cpu", reason="FlexAttention has no backward on CPU")
@pytest.mark.parametrize("seed", range(2))
def test_gradients_of_flex_attention(seed):
    """No further from float64 than twice what torch is in the same type under the mask."""
    plan = random_plan(torch.Generator().manual_seed(300 + seed)).to(DEVICE)
    check_type(flex.packed_attention_flex, plan, HEADS[seed], torch.float32)


def test_what_is_kept_for_the_backward_pass():
    """Queries, keys, values, the result and one logarithm for each query and head: linear."""
    plan = random_plan(torch.Generator().manual_seed(9))
    *tensors, _ = inputs(plan, HEADS[1], 9)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        packed_attention(*tensors, plan, 0.3)
    num_heads, num_kv_heads, size = HEADS[1]
    per_token = 2 * num_heads * size + 2 * num_kv_heads * size + num_heads
    assert sum(tensor.numel() for tensor in saved) == per_token * plan.num_tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_bias_of_a_part(dtype):
    """It follows the plan, whatever the parts before had."""
    for seed in range(12):
        plan, stop = random_plan(torch.Generator().manual_seed(seed)), 0
        for part, (bias,) in part_biases(plan, PART if seed % 2 else 50, dtype):
            assert part.first == stop
            stop = part.stop
            token = torch.arange(part.first, part.stop)[:, None]
            entry = torch.cat([torch.arange(0), *(torch.arange(*each) for each in part.entries)])
            in_ranges = [(entry >= f[token]) & (entry < limit[token]) for f, limit in plan.ranges]
            place = torch.arange(part.window_first, part.stop)
            in_window = (place >= plan.window_first[token]) & (place <= token)
            seen = torch.cat([torch.stack(in_ranges).any(0), in_window], 1)
            assert bias.dtype == dtype
            assert torch.equal(bias[0], torch.where(seen, 0.0, -math.inf).to(dtype))
        assert stop == plan.num_tokens


@pytest.mark.parametrize(
    ("seed", "heads", "dtype"),
    [
        (200, (4, 4, 16), torch.float32),
        (201, (6, 2, 80), torch.float32),
        (202, (2, 1, 64), torch.bfloat16),
        (205, (4, 2, 32), torch.float16),
    ],
)
def test_kernels(seed, heads, dtype):
    """No further from float64 than twice what torch is in the same type under the mask."""
    plan = random_plan(torch.Generator().manual_seed(seed)).to(DEVICE)
    check_type(packed_attention_triton, plan, heads, dtype)


@pytest.mark.parametrize("operation", [packed_attention_torch, packed_attention_triton])
def test_tiles_that_nobody_sees_are_not_read(operation):
    """Zero times NaN is NaN: what is read for a token reaches its result, however little it counts.
    The first and the last text are NaN, and the third is as if they were not. Texts between them
    may share a tile with the third, or with tokens that see such a tile."""
    lengths = 256, 448, 200, 448, 448, 256
    texts = [vars(text_of(length, 2, 60)) for length in lengths]
    plan = joined_plan([{**text, "sinks": torch.zeros_like(text["stream"])} for text in texts])
    plan.check()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    device = DEVICE if operation is packed_attention_triton else "cpu"
    plan = plan.to(device)
    given = [t.detach().float().to(device) for t in inputs(plan, (2, 1, 16), 11)]
    poisoned = [tensor.clone() for tensor in given]
    for tensor in poisoned:
        tensor[: ends[0]] = tensor[ends[4] :] = math.nan
    for tensor in (*given[:3], *poisoned[:3]):
        tensor.requires_grad_()
    wanted, found = (passes(operation, each, plan, 0.3) for each in (given, poisoned))
    middle = slice(ends[1], ends[2])
    for ours, other in zip(found, wanted, strict=True):
        assert ours[: ends[0]].isnan().all()
        assert torch.equal(ours[middle], other[middle])


@pytest.mark.parametrize("num_sinks", [0, 4])
def test_kernels_where_all_tokens_see_a_tile(num_sinks):
    """No mask is made there: with a bound, and without."""
    plan = text_of(400, 1, 150)
    if num_sinks:  # apart, and of the rest the newest 200
        limit = plan.stream[1]
        sinks = torch.stack([torch.zeros_like(limit), limit.clamp(max=num_sinks)])
        first = (limit - 200).clamp(min=0).maximum(sinks[1])
        plan = PackedPlan(plan.kept, plan.window_first, torch.stack([first, limit]), sinks)
    plan.check()
    for seen in (plan.seen_in_stream, plan.seen_in_window):
        assert steps_without_a_mask(seen, KEY_GRADIENT[0]) > 0
    check_type(packed_attention_triton, plan.to(DEVICE), (2, 1, 16), torch.float32)


def steps_without_a_mask(seen, launch) -> int:
    """Of the loops over the tokens that see a tile, steps of which all see all of it."""
    found = 0
    for tile in seen.split(launch.tile, 1):
        (first, stop), (full_first, full_stop) = (
            (tile[0, 0], tile[1, -1]),
            (tile[0, -1], tile[1, 0]),
        )
        starts = range(int(first), int(stop), launch.rows)
        found += sum(bool(full_first <= at and at + launch.rows <= full_stop) for at in starts)
    return found


def test_kernels_take_tensors_as_models_have_them():
    plan = text_of(150, 5, 40).to(DEVICE)
    tensors = [tensor.detach().float().to(DEVICE) for tensor in inputs(plan, HEADS[1], 7)[:3]]
    apart = [t.transpose(0, 1).contiguous().requires_grad_() for t in tensors]
    output = packed_attention_triton(*(t.transpose(0, 1) for t in apart), plan, 0.3)
    output.sum().backward()  # a gradient of strides 0
    side_by_side = [t.requires_grad_() for t in tensors]
    again = packed_attention_triton(*side_by_side, plan, 0.3)
    again.backward(torch.ones_like(again))
    assert torch.equal(output, again)
    for ours, other in zip(apart, side_by_side, strict=True):
        assert torch.equal(ours.grad.transpose(0, 1), other.grad)


def check_type(operation, plan, heads, dtype):
    device = plan.window_first.device
    given = [tensor.detach().to(device, dtype) for tensor in inputs(plan, heads, 5)]
    rounded = [tensor.double() for tensor in given]
    for tensor in (*given[:3], *rounded[:3]):
        tensor.requires_grad_()
    exact = passes(masked, rounded, plan.mask(), 0.3)
    theirs = passes(fused, given, plan.mask(), 0.3)
    found = passes(operation, given, plan, 0.3)
    for ours, other, wanted in zip(found, theirs, exact, strict=True):
        assert ours.dtype == dtype
        allowed = 2 * float((other.double() - wanted).abs().max())
        assert float((ours.double() - wanted).abs().max()) <= allowed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"value": torch.zeros(3, 2, 4)}, "keys and values must be alike"),
        ({"query": torch.zeros(3, 2, 4)}, "all heads of one size"),
        ({"value": torch.zeros(3, 2, 8).double()}, "must be of one type"),
        ({"query": torch.zeros(4, 2, 8)}, "4 queries and 3 keys for a plan of 3 tokens"),
        ({"query": torch.zeros(3, 3, 8)}, "3 heads of queries cannot be shared out to 2"),
    ],
)
def test_tensors_that_do_not_fit(change, sentence):
    given = {name: torch.zeros(3, 2, 8) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=sentence):
        packed_attention(**{**given, **change}, plan=text_of(3, 2, 2), scale=1.0)


@pytest.mark.parametrize(
    ("size", "dtype", "sentence"),
    [
        (16, torch.float64, "float64, for which there is no GPU kernel"),
        (8, torch.float32, "heads have 8 elements"),
    ],
)
def test_what_no_gpu_kernel_computes(size, dtype, sentence):
    check_gpu_has_kernels(torch.zeros(3, 2, 16, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=sentence):
        check_gpu_has_kernels(torch.zeros(3, 2, size, dtype=dtype))


def text_of(num_tokens: int, every: int, window: int) -> PackedPlan:
    """A text in which every so many tokens one is kept."""
    kept = torch.arange(0, num_tokens, every)
    first = (torch.arange(num_tokens) - window + 1).clamp(min=0)
    limit = torch.searchsorted(kept, first)
    return PackedPlan(kept, first.int(), torch.stack([torch.zeros_like(limit), limit]).int())


def test_pairs():
    """Counted pairs are those of the formula, and work follows from them: a part reads what its
    tokens see, and beyond that its own tokens and its last token's stream at most."""
    num_tokens, every, window = 8192, 8, 128
    plan = text_of(num_tokens, every, window)
    in_window = num_tokens * window - window * (window - 1) // 2
    behind = num_tokens - window  # queries with something behind their window
    in_stream = sum(-(-n // every) for n in range(1, behind + 1))
    assert plan.num_pairs == in_window + in_stream
    read = 0
    for part in plan.parts(PART):
        entries = sum(stop - first for first, stop in part.entries)
        read += (part.stop - part.first) * (entries + part.stop - part.window_first)
    assert plan.num_pairs < read <= plan.num_pairs + num_tokens * PART * (1 + 1 / every)
    assert read < 0.27 * num_tokens**2 / 2  # of causal attention; 0.18 are visible


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"window_first": torch.tensor([0, 2, 1])}, "window_first"),
        ({"window_first": torch.tensor([0, 1, 0])}, "decreases"),
        ({"stream": torch.tensor([[0, 0, 0], [0, 0, 9]])}, "must lie in its 1 entries"),
        ({"stream": torch.tensor([[0, 0, 0], [1, 1, 1]])}, "twice"),
        ({"stream": torch.zeros(2, 2)}, "not \\[2, num_tokens\\]"),
    ],
)
def test_plans_that_break_a_promise(change, sentence):
    good = {"kept": torch.tensor([0]), "window_first": torch.zeros(3), "stream": torch.zeros(2, 3)}
    PackedPlan(**good).check()
    with pytest.raises(ValueError, match=sentence):
        PackedPlan(**{**good, **change}).check()
