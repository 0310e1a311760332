"""Pages of the CPU kernels: what is written is read back, and attended as the reference does."""

import numpy as np
import pytest
import torch

from vllm_sepllm.engine.cpu.attention import CpuPages, PagedCall, probe_layout
from vllm_sepllm.engine.cpu.plan import MergedPages, PackedEntries, PagedPlan
from vllm_sepllm.oracle.dense_mask import masked_attention

pytestmark = pytest.mark.engine

SHAPES = [(32, 32, torch.float32), (32, 64, torch.bfloat16), (16, 80, torch.bfloat16)]
SHAPES += [(32, 128, torch.float16), (16, 64, torch.float32), (32, 256, torch.bfloat16)]


@pytest.fixture(scope="module", autouse=True)
def _kernels():
    from vllm.platforms import current_platform

    current_platform.import_kernels()


def isa_of(block_size, head_size, dtype):
    from vllm_sepllm.engine.cpu.backend import kernel_isa

    return kernel_isa(dtype, block_size, head_size)


@pytest.mark.parametrize("has_amx", [False, True])
def test_amx_is_not_used(monkeypatch, has_amx):
    """vLLM 0.32 computes wrongly with it; its own choice is AMX where there is any."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    shape = 32, 64, torch.bfloat16
    assert (_get_attn_isa(shape[2], *shape[:2], "auto") == "amx") == has_amx
    assert isa_of(*shape) == "vec"
    assert isa_of(32, 80, torch.bfloat16) == "vec16"


def make_pages(block_size, head_size, dtype, num_pages=12, staging=3, num_heads=2, layer=0):
    """Pages of one of two layers; whatever is never written is NaN."""
    per_layer = num_pages * num_heads * block_size * 2 * head_size
    extra = staging * num_heads * block_size * 2 * head_size
    buffer = torch.full((2 * per_layer + extra,), float("nan"), dtype=dtype)
    shape = (num_pages, num_heads, block_size, 2 * head_size)
    cache = buffer[layer * per_layer : (layer + 1) * per_layer].view(shape)
    layers_end = 2 * per_layer * buffer.element_size()
    return CpuPages(cache, layers_end, isa_of(block_size, head_size, dtype))


@pytest.mark.parametrize(("block_size", "head_size", "dtype"), SHAPES)
def test_layout_is_a_rearrangement_of_the_entries(block_size, head_size, dtype):
    layout = probe_layout(block_size, head_size, dtype, isa_of(block_size, head_size, dtype))
    index = torch.cat([layout.key_index.flatten(), layout.value_index.flatten()])
    assert torch.equal(index.sort().values, torch.arange(2 * block_size * head_size))
    for table in (layout.key_index, layout.value_index):
        entries = layout.entry_of[table.numpy()]
        assert (entries == np.arange(block_size)[:, None]).all()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("block_size", "head_size", "dtype"), SHAPES)
def test_read_back_what_was_written(block_size, head_size, dtype, layer):
    pages = make_pages(block_size, head_size, dtype, layer=layer)
    torch.manual_seed(0)
    count = 3 * block_size
    key, value = torch.randn(2, count, 2, head_size).to(dtype)
    page_ids = torch.tensor([7, 2, 11])
    slots = (page_ids[:, None] * block_size + torch.arange(block_size)).flatten()
    pages.write(key, value, slots)
    read_key, read_value = pages.read_pages(page_ids)
    assert torch.equal(read_key, key.transpose(0, 1))
    assert torch.equal(read_value, value.transpose(0, 1))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("block_size", "head_size", "dtype"), SHAPES)
def test_staging_merges_and_packs(block_size, head_size, dtype, layer):
    pages = make_pages(block_size, head_size, dtype, layer=layer)
    torch.manual_seed(1)
    key, value = torch.randn(2, 12 * block_size, 2, head_size).to(dtype)
    pages.write(key, value, torch.arange(12 * block_size))
    heads, tails = np.array([1, 4, 9]), np.array([3, 0, 2])
    splits = np.array([1, block_size - 1, block_size // 2])
    pages.stage(MergedPages(heads, tails, splits), None)
    first = pages.first_staging_page
    got_key, got_value = pages.read_pages(torch.arange(first, first + 3))
    for j in range(3):
        for offset in range(block_size):
            source = (tails if offset < splits[j] else heads)[j] * block_size + offset
            assert torch.equal(got_key[:, j * block_size + offset], key[source])
            assert torch.equal(got_value[:, j * block_size + offset], value[source])
    source_pages = np.array([5, 5, 8, 10])
    offsets = np.array([0, block_size - 1, 3, 7])
    slots = np.array([0, 1, 2, block_size + 5])
    packed = PackedEntries(source_pages, offsets, slots)
    pages.stage(None, packed)
    got_key, got_value = pages.read_pages(torch.arange(first, first + 2))
    sources = source_pages * block_size + offsets
    for gathered, written in zip(pages.gather(packed), (key, value), strict=True):
        assert torch.equal(gathered, written[sources])
    assert torch.equal(got_key[:, slots], key[sources].transpose(0, 1))
    assert torch.equal(got_value[:, slots], value[sources].transpose(0, 1))


@pytest.mark.parametrize(("block_size", "head_size", "dtype"), SHAPES)
def test_paged_call_equals_the_reference(block_size, head_size, dtype):
    """A ragged batch over scattered and staged pages, against float32 attention."""
    torch.manual_seed(2)
    num_heads, num_kv_heads = 4, 2
    pages = make_pages(block_size, head_size, dtype)
    key, value = torch.randn(2, 12 * block_size, num_kv_heads, head_size).to(dtype)
    # Pages that are not named stay NaN. Behind the last entry of a named page vLLM's kernel
    # multiplies whatever lies there by zero, so there it is large instead.
    tables = [[4, 7, 1], [2], [9, 5]]
    named = torch.tensor([page for table in tables for page in table])
    slots = (named[:, None] * block_size + torch.arange(block_size)).flatten()
    junk = torch.full((len(slots), num_kv_heads, head_size), 99.0, dtype=dtype)
    pages.write(junk, junk, slots)
    lengths = [2 * block_size + 5, 3, 2 * block_size]
    for table, length in zip(tables, lengths, strict=True):
        slots = [table[i // block_size] * block_size + i % block_size for i in range(length)]
        index = torch.tensor(slots)
        pages.write(key[index], value[index], index)
    block_table = np.array([[4, 7, 1], [2, 0, 0], [0, 5, 0]], dtype=np.int32)
    staged = np.array([2]), np.array([0])  # a copy of page 9
    copy = MergedPages(np.array([9]), np.array([9]), np.array([block_size]))
    query_lens = [1, 3, 1]
    starts = np.cumsum([0, *query_lens]).astype(np.int32)
    seq_lens = np.array(lengths, dtype=np.int32)
    plan = PagedPlan(np.arange(3), block_table, staged, seq_lens, starts, copy, None)
    query = torch.randn(sum(query_lens), num_heads, head_size).to(dtype)
    output = torch.full_like(query, float("nan"))
    scale = head_size**-0.5
    call = PagedCall(plan, num_heads, num_kv_heads, head_size, dtype, pages.isa)
    call.run(pages, query, output, scale, 0.0)
    first = 0
    for table, length, count in zip(tables, lengths, query_lens, strict=True):
        index = [table[i // block_size] * block_size + i % block_size for i in range(length)]
        mask = torch.arange(length)[None] <= torch.arange(length - count, length)[:, None]
        part = slice(first, first + count)
        exact = masked_attention(query[part], key[index], value[index], mask, scale)
        # The same arithmetic in torch, in the layer's dtype: what rounding alone may do.
        same = torch.nn.functional.scaled_dot_product_attention(
            query[part].transpose(0, 1),
            key[index].transpose(0, 1).repeat_interleave(2, 0),
            value[index].transpose(0, 1).repeat_interleave(2, 0),
            attn_mask=mask,
            scale=scale,
        ).transpose(0, 1)
        bound = 2 * (same.float() - exact).abs().max() + 4 * torch.finfo(dtype).eps
        assert (output[part].float() - exact).abs().max() <= bound
        first += count


def test_staging_never_reaches_into_a_layer():
    """Layers with pages of different sizes: each finds its staging behind the last layer."""
    block_size, head_size, num_pages = 32, 32, 7
    page = block_size * 2 * head_size
    heads = [1, 3, 2]
    ends = np.cumsum([num_pages * h * page for h in heads])
    buffer = torch.zeros(int(ends[-1]) + 5 * max(heads) * page)
    isa = isa_of(block_size, head_size, torch.float32)
    for h, end in zip(heads, ends, strict=True):
        cache = buffer[end - num_pages * h * page : end]
        cache = cache.view(num_pages, h, block_size, 2 * head_size)
        pages = CpuPages(cache, int(ends[-1]) * 4, isa)
        start = cache.storage_offset() + pages.first_staging_page * h * page
        assert ends[-1] <= start < ends[-1] + h * page
        assert len(pages.key_cache) - pages.first_staging_page >= 4


def test_pages_that_do_not_follow_each_other_are_refused():
    buffer = torch.zeros(4, 2, 32, 64)
    with pytest.raises(ValueError, match="elements apart"):
        CpuPages(buffer[::2], buffer.nbytes, "vec")
