import pytest
import torch
from batches import DEVICE, NAN, Shape, far_apart, make_pages
from sepllm_kernels.batch import PagedKV
from sepllm_kernels.rotate_queries import rotate_queries, rotate_queries_reference
from sepllm_kernels.write_kv import write_kv, write_kv_reference

pytestmark = pytest.mark.kernels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FP8 = torch.float8_e4m3fn
NUM_PAGES = 9


def empty_pages(shape: Shape, heads_first: bool = True) -> PagedKV:
    stored = torch.full((NUM_PAGES, 2, shape.num_kv_heads, shape.page_size, shape.head_size), NAN)
    return make_pages(stored, shape, heads_first)


def random_inputs(shape: Shape, num_tokens: int = 30, seed: int = 0):
    """Keys, values, window slots and stream slots; no slot is written twice."""
    rng = torch.Generator().manual_seed(seed)
    sizes = (2, num_tokens, shape.num_kv_heads, shape.head_size)
    key, value = torch.randn(sizes, generator=rng).to(shape.dtype).to(DEVICE)
    slots = torch.randperm(NUM_PAGES * shape.page_size, generator=rng)[: 2 * num_tokens]
    window, stream = slots.to(DEVICE).split(num_tokens)
    stream = torch.where(torch.rand(num_tokens, generator=rng).to(DEVICE) < 0.3, stream, -1)
    window = torch.where(torch.arange(num_tokens).to(DEVICE) == 5, -1, window)
    return key, value, window.contiguous(), stream.contiguous()


def write_both(shape: Shape, scales=(1.0, 1.0), heads_first: bool = True, inputs=None, **rotation):
    inputs = inputs or random_inputs(shape)
    results = []
    for operation in (write_kv, write_kv_reference):
        pages = empty_pages(shape, heads_first)
        operation(*inputs[:2], PagedKV(pages.key, pages.value, *scales), *inputs[2:], **rotation)
        results.append(torch.stack([pages.key.float(), pages.value.float()]).cpu())
    return results


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (~expected.isnan()).any()
    torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("heads_first", [True, False])
def test_both_copies(dtype, page_size, heads_first):
    """Not a bit is changed, and nothing else is written."""
    shape = Shape(page_size=page_size, dtype=dtype)
    assert_same(*write_both(shape, heads_first=heads_first))


@pytest.mark.parametrize("sizes", [(1, 80), (3, 96), (8, 128), (2, 256)])
def test_shapes(sizes):
    assert_same(*write_both(Shape(num_kv_heads=sizes[0], head_size=sizes[1])))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.25, 2.0), (0.001, 0.003)])
def test_fp8(dtype, scales):
    """Scales that are powers of two give the same bits; the last pair is beyond FP8's range."""
    found, expected = write_both(Shape(dtype=dtype, kv_dtype=FP8), scales)
    assert torch.equal(found.isnan(), expected.isnan())
    written = ~expected.isnan()
    if scales[0] >= 0.25:
        assert torch.equal(found[written], expected[written])
    else:
        assert float(found[written].abs().max()) == torch.finfo(FP8).max
        # The kernel multiplies by the inverse, so what lies between two numbers may go either way.
        step = (found[written] - expected[written]).abs() / expected[written].abs().clamp(min=2**-6)
        assert float(step.max()) <= 2**-3


def test_values_between_two_tokens_of_a_projection():
    """Keys and values as slices of one tensor, as models hand them over."""
    shape = Shape()
    key, value, *slots = random_inputs(shape)
    fused = torch.cat([key, value], 1)
    parts = fused.split(shape.num_kv_heads, 1)
    assert not parts[0].is_contiguous()
    found, expected = write_both(shape, inputs=(*parts, *slots))
    assert_same(found, expected)
    assert_same(found, write_both(shape)[1])


def test_pages_far_apart():
    shape = Shape(dtype=BF16, kv_dtype=FP8)
    inputs = random_inputs(shape)
    pages = far_apart(empty_pages(shape))
    last_page = max(int(slots.max()) for slots in inputs[2:]) // shape.page_size
    assert last_page * pages.key.stride(0) >= 1 << 31
    write_kv(*inputs[:2], pages, *inputs[2:])
    found = torch.stack([pages.key.float(), pages.value.float()]).cpu()
    assert_same(found, write_both(shape, inputs=inputs)[1])


def cos_sin_of(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat([angles.cos(), angles.sin()], -1).float()


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [64, 32, 16])
def test_rotated_stream(is_neox, rotary_dim):
    """Only the stream's copy of the key is rotated, and only its first elements."""
    shape = Shape()
    inputs = random_inputs(shape)
    rng = torch.Generator().manual_seed(1)
    angles = 50 * torch.randn(len(inputs[2]), rotary_dim // 2, generator=rng)
    cos_sin = cos_sin_of(angles).to(DEVICE)
    found, expected = write_both(shape, inputs=inputs, stream_cos_sin=cos_sin, is_neox=is_neox)
    # Two products and a sum, each rounded, or the second product not.
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, equal_nan=True)
    plain = write_both(shape, inputs=inputs)[1]
    changed = ~torch.isclose(plain, expected, equal_nan=True, atol=1e-3)
    assert changed[0].any()
    assert not changed[1].any()
    assert not changed[0][..., rotary_dim:].any()


def test_a_rotation_is_that_of_positions():
    """A key rotated for position p, written with the rotation of j - p, is rotated for j."""
    shape = Shape(num_kv_heads=1)
    rng = torch.Generator().manual_seed(2)
    plain = torch.randn(1, 1, shape.head_size, generator=rng)
    half = shape.head_size // 2
    frequencies = 10000.0 ** (-torch.arange(half).double() / half)

    def rotated_for(position: int) -> torch.Tensor:
        turn = torch.polar(torch.ones(half).double(), position * frequencies)
        pairs = torch.complex(plain[..., :half].double(), plain[..., half:].double()) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    pages = empty_pages(shape)
    write_kv(
        rotated_for(900).float().to(DEVICE),
        plain.to(DEVICE),
        pages,
        torch.tensor([-1], device=DEVICE),
        torch.tensor([17], device=DEVICE),
        cos_sin_of((37 - 900) * frequencies)[None].to(DEVICE),
    )
    # The key, its rotation, and both products are rounded to float32; elements are below 4.
    expected = rotated_for(37)[0]
    torch.testing.assert_close(pages.key[1, :, 1].cpu().double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("sizes", [(4, 64, 64), (1, 80, 20), (32, 128, 128), (6, 96, 32)])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_rotated_queries(dtype, is_neox, sizes, num_parts):
    num_heads, head_size, rotary_dim = sizes
    rng = torch.Generator().manual_seed(4)
    fused = torch.randn(9, num_heads + 3, head_size, generator=rng).to(dtype).to(DEVICE)
    query = fused[:, :num_heads]  # a slice of a projection
    cos_sin = cos_sin_of(50 * torch.randn(num_parts, 9, rotary_dim // 2, generator=rng)).to(DEVICE)
    found = rotate_queries(query, cos_sin, is_neox)
    expected = rotate_queries_reference(query, cos_sin, is_neox)
    assert found.shape == (1 + num_parts, 9, num_heads, head_size)
    assert found.dtype == dtype
    assert torch.equal(found[0], query)
    assert torch.equal(found[..., rotary_dim:], expected[..., rotary_dim:])
    # Elements are below 5; one rounding of the dtype may go the other way.
    atol = 1e-6 if dtype == F32 else 5 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    assert not torch.isclose(found[1], query, atol=0.1).all()
    assert rotate_queries(query[:0], cos_sin[:, :0], is_neox).shape[1] == 0


def test_what_is_no_number_stays_none():
    """As a number, FP8's largest, it would hide what is wrong with a model."""
    pages = torch.zeros(2, 2, 16, 2 * 32, device=DEVICE).to(FP8)
    key = torch.zeros(1, 2, 32, dtype=BF16, device=DEVICE)
    key[0, 1, 3] = torch.nan
    slots = torch.full((1,), 20, dtype=torch.int64, device=DEVICE)
    write_kv(key, torch.ones_like(key), PagedKV(*pages.tensor_split(2, -1)), slots, slots)
    found = pages.float()[1, :, 4, :32]
    assert found[1, 3].isnan()
    assert found.isnan().sum() == 1
