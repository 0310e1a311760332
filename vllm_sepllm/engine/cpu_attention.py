"""KV pages of vLLM's CPU kernels: write, read back, attend.

All layers live in one buffer: layer after layer, page after page, and behind the last layer the
staging pages, shared by all layers (``engine/worker.py`` makes room for them). A layer's view
starts at its own first page and reaches to the end of the buffer, so one block table can name
pages of the layer and staging pages alike::

    buffer   | layer 0: page 0 1 2 ... | layer 1: page 0 1 2 ... | staging 0 1 2 |
    layer 1's view                     0 1 2 ...                   N N+1 N+2

Where the kernel keeps each element inside a page depends on the instruction set (keys are
stored transposed, or in tiles). That order is found out once by writing markers through vLLM's
own writer, so nothing here assumes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from vllm import _custom_ops as ops
from vllm import envs

from vllm_sepllm.engine.cpu_plan import MergedPages, PackedEntries, PagedRows

_INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of an element


@dataclass(frozen=True)
class PageLayout:
    """Order of elements in one head of a page, flattened.

    Attributes:
        key_index: ``[block_size, head_size]`` int64, flat index of each key element.
        value_index: the same for values.
        entry_of: ``[2 * block_size * head_size]`` int64, entry that each flat element is of.
    """

    key_index: torch.Tensor
    value_index: torch.Tensor
    entry_of: torch.Tensor


@cache
def probe_layout(block_size: int, head_size: int, dtype: torch.dtype, isa: str) -> PageLayout:
    """Find out the order of elements by writing markers and reading them back."""
    base = 128  # markers stay below it: small integers are exact in every dtype
    entry = torch.arange(block_size)[:, None].expand(block_size, head_size)
    element = torch.arange(head_size)[None, :].expand(block_size, head_size)
    flat = (entry * head_size + element).contiguous()
    digits = [flat // base**power % base for power in range(3)]
    found = torch.zeros(2, block_size * head_size, dtype=torch.int64)
    for power, digit in enumerate(digits):
        page = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
        markers = digit.to(dtype)[:, None, :].contiguous()
        key_cache, value_cache = page.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            markers, markers, key_cache, value_cache, torch.arange(block_size), isa
        )
        found += page.view(2, -1).to(torch.int64) * base**power
    expected = torch.arange(block_size * head_size)
    if not all(torch.equal(half.sort().values, expected) for half in found):
        raise RuntimeError(
            f"the CPU kernel's page layout for isa={isa!r}, block size {block_size} and head size "
            f"{head_size} is not a rearrangement of the entries: this vLLM is not supported"
        )
    shape = (block_size, head_size)
    return PageLayout(
        found[0].argsort().view(shape),
        found[1].argsort().view(shape) + block_size * head_size,
        (found // head_size).flatten(),
    )


class CpuPages:
    """One layer's pages, and the staging pages behind the last layer.

    Args:
        kv_cache: ``[num_pages, num_kv_heads, block_size, 2 * head_size]``, the layer's view of
            the shared buffer.
        num_staging_pages: pages at the end of the buffer that belong to nobody.
        isa: instruction set vLLM's kernels use for these pages.

    Raises:
        ValueError: the buffer's pages are not all of one size.
    """

    def __init__(self, kv_cache: torch.Tensor, num_staging_pages: int, isa: str) -> None:
        _, num_kv_heads, block_size, width = kv_cache.shape
        head_size = width // 2
        page = num_kv_heads * block_size * width
        total = int(kv_cache.untyped_storage().nbytes()) // kv_cache.element_size()
        offset = int(kv_cache.storage_offset())
        num_pages, rest = divmod(total - offset, page)
        if rest or kv_cache.stride(0) != page:
            raise ValueError(
                f"KV cache pages of different sizes in one buffer ({page} elements here) are not "
                "supported by SepLLM attention: use another attention backend"
            )
        view = torch.as_strided(
            kv_cache,
            (num_pages, num_kv_heads, 2 * block_size, head_size),
            (page, 2 * block_size * head_size, head_size, 1),
        )
        self.isa = isa
        self.block_size = block_size
        self.first_staging_page = num_pages - num_staging_pages
        self.key_cache, self.value_cache = view.chunk(2, dim=2)
        self._flat = view.view(num_pages, num_kv_heads, -1)
        words = self._flat.view(torch.int64)
        self._words = words[: self.first_staging_page]
        self._staging = words[self.first_staging_page :]
        self._layout = probe_layout(block_size, head_size, kv_cache.dtype, isa)

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Write ``[num_tokens, num_kv_heads, head_size]`` to ``[num_tokens]`` int64 slots."""
        ops.cpu_attn_reshape_and_cache(
            key, value, self.key_cache, self.value_cache, slots, self.isa
        )

    def read_pages(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole pages, ``[num_kv_heads, num_pages * block_size, head_size]``."""
        taken = self._flat.index_select(0, pages)

        def entries(index: torch.Tensor) -> torch.Tensor:
            ordered = taken.index_select(2, index.flatten())  # [pages, heads, entries * size]
            ordered = ordered.view(*taken.shape[:2], *index.shape)
            return ordered.transpose(0, 1).flatten(1, 2)

        return entries(self._layout.key_index), entries(self._layout.value_index)

    def read_entries(
        self, pages: torch.Tensor, offsets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of single entries, ``[num_entries, num_kv_heads, head_size]``."""
        heads = torch.arange(self._flat.shape[1])[None, :, None]
        pages = pages[:, None, None]

        def entries(index: torch.Tensor) -> torch.Tensor:
            return self._flat[pages, heads, index[offsets][:, None, :]]

        return entries(self._layout.key_index), entries(self._layout.value_index)

    def merge_mask(self, splits: torch.Tensor) -> torch.Tensor:
        """``[num_staged, 1, words]`` int64: all bits of elements of entries below each split."""
        element = _INTEGERS[self._flat.element_size()]
        below = self._layout.entry_of < splits[:, None]
        return below.to(element).neg_()[:, None, :].view(torch.int64)

    def stage_merged(self, heads: torch.Tensor, tails: torch.Tensor, mask: torch.Tensor) -> None:
        """Fill the first staging pages: ``tails`` where ``mask`` has ones, ``heads`` elsewhere.

        Bitwise on whole words: several times as fast as ``torch.where`` on bfloat16.
        """
        staging = self._staging[: heads.shape[0]]
        torch.index_select(self._words, 0, heads, out=staging)
        differing = self._words.index_select(0, tails).bitwise_xor_(staging)
        staging.bitwise_xor_(differing.bitwise_and_(mask))

    def stage_packed(self, pages: torch.Tensor, offsets: torch.Tensor, slots: torch.Tensor) -> None:
        """Copy entries to slots counted from the first staging page."""
        key, value = self.read_entries(pages, offsets)
        self.write(key, value, slots + self.first_staging_page * self.block_size)


class PagedCall:
    """One call of vLLM's C++ paged kernel, prepared once per step and run for each layer.

    Args:
        rows: what is read.
        query_lens: ``[n]`` queries of each request.
        num_heads, num_kv_heads, head_size, dtype, isa: of the layers.
    """

    def __init__(
        self,
        rows: PagedRows,
        query_lens: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        isa: str,
    ) -> None:
        self._table = rows.block_table
        self._staged = rows.staged.nonzero()
        self._staged_pages = rows.block_table[self._staged]
        self._merged = _tensors(rows.merged) if rows.merged else None
        self._packed = _tensors(rows.packed) if rows.packed else None
        self._mask: torch.Tensor | None = None
        self._seq_lens = torch.from_numpy(rows.seq_lens)
        self._query_start = torch.zeros(len(query_lens) + 1, dtype=torch.int32)
        torch.cumsum(query_lens, 0, out=self._query_start[1:])
        self._schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(query_lens),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_size,
            seq_lens=self._seq_lens,
            dtype=dtype,
            query_start_loc=self._query_start,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )

    def run(
        self,
        pages: CpuPages,
        query: torch.Tensor,
        output: torch.Tensor,
        scale: float,
        logits_soft_cap: float,
    ) -> None:
        """Attend ``query`` into ``output``, both ``[num_queries, num_heads, head_size]``."""
        # Staging pages are numbered from the layer's own first page.
        self._table[self._staged] = self._staged_pages + pages.first_staging_page
        if self._merged is not None:
            heads, tails, splits = self._merged
            if self._mask is None:
                self._mask = pages.merge_mask(splits)
            pages.stage_merged(heads, tails, self._mask)
        if self._packed is not None:
            pages.stage_packed(*self._packed)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=pages.key_cache,
            value_cache=pages.value_cache,
            output=output,
            query_start_loc=self._query_start,
            seq_lens=self._seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=torch.from_numpy(self._table),
            softcap=logits_soft_cap,
            scheduler_metadata=self._schedule,
            s_aux=None,
        )


def _tensors(copies: MergedPages | PackedEntries) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in vars(copies).values())
