"""KV pages of vLLM's CPU kernels: write, read back, attend.

All layers live in one buffer: layer after layer, page after page, and behind the last layer the
staging pages, shared by all layers (``engine/cpu_worker.py`` makes room for them). A layer's view
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

import numpy as np
import numpy.typing as npt
import torch
from vllm import _custom_ops as ops
from vllm import envs

from vllm_sepllm.engine.cpu.plan import PagedPlan
from vllm_sepllm.engine.cpu.staging import gather_entries, merge_pages, pack_entries
from vllm_sepllm.engine.cpu.tables import MergedPages, PackedEntries
from vllm_sepllm.engine.worker.rotation import Rotation

_INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes of an element


@dataclass(frozen=True)
class PageLayout:
    """Order of elements in one head of a page, flattened.

    Attributes:
        key_index: ``[block_size, head_size]`` int64, flat index of each key element.
        value_index: the same for values.
        entry_of: ``[2 * block_size * head_size]`` int16, entry that each flat element is of.
    """

    key_index: torch.Tensor
    value_index: torch.Tensor
    entry_of: npt.NDArray[np.int16]


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
        (found // head_size).flatten().to(torch.int16).numpy(),
    )


class CpuPages:
    """One layer's pages, and the staging pages behind the last layer.

    Args:
        kv_cache: ``[num_pages, num_kv_heads, block_size, 2 * head_size]``, the layer's view of
            the shared buffer.
        staging_start: bytes of the buffer that belong to layers; what follows is for staging.
        isa: instruction set vLLM's kernels use for these pages.

    Raises:
        ValueError: the layer's pages do not follow each other.
    """

    def __init__(self, kv_cache: torch.Tensor, staging_start: int, isa: str) -> None:
        _, num_kv_heads, block_size, width = kv_cache.shape
        head_size = width // 2
        page = num_kv_heads * block_size * width
        total = int(kv_cache.untyped_storage().nbytes()) // kv_cache.element_size()
        offset = int(kv_cache.storage_offset())
        if kv_cache.stride(0) != page:
            raise ValueError(
                f"KV cache pages {kv_cache.stride(0)} elements apart, of {page} elements each, "
                "are not supported by SepLLM attention: use another attention backend"
            )
        num_pages = (total - offset) // page
        view = torch.as_strided(
            kv_cache,
            (num_pages, num_kv_heads, 2 * block_size, head_size),
            (page, 2 * block_size * head_size, head_size, 1),
        )
        self.isa = isa
        self.block_size = block_size
        self.first_staging_page = -((offset - staging_start // kv_cache.element_size()) // page)
        self.num_staging_pages = num_pages - self.first_staging_page
        self.key_cache, self.value_cache = view.chunk(2, dim=2)
        self._flat = view.view(num_pages, num_kv_heads, -1)
        self._integer = _INTEGERS[kv_cache.element_size()]
        self._bits = self._flat.view(self._integer).numpy()
        self._layout = probe_layout(block_size, head_size, kv_cache.dtype, isa)
        self._key_index = self._layout.key_index.numpy()
        self._value_index = self._layout.value_index.numpy()
        self._compile()

    def _compile(self) -> None:
        """Have numba compile both copies now, not in the first decode step."""
        none = np.zeros(0, dtype=np.int64)
        nothing = PackedEntries(none, none, none)
        self.stage(MergedPages(none, none, none), nothing)
        self.gather(nothing)

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

    def gather(self, packed: PackedEntries) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of single entries, ``[num_entries, num_kv_heads, head_size]``."""
        shape = len(packed.pages), self._flat.shape[1], self._layout.key_index.shape[1]
        key, value = torch.empty((2, *shape), dtype=self._flat.dtype)
        gather_entries(
            self._bits,
            packed.pages,
            packed.offsets,
            self._key_index,
            self._value_index,
            key.view(self._integer).numpy(),
            value.view(self._integer).numpy(),
        )
        return key, value

    def stage(self, merged: MergedPages | None, packed: PackedEntries | None) -> None:
        """Make the copies a plan asks for."""
        if merged is not None:
            merge_pages(
                self._bits,
                self.first_staging_page,
                merged.heads,
                merged.tails,
                merged.splits,
                self._layout.entry_of,
            )
        if packed is not None:
            pack_entries(
                self._bits,
                self.first_staging_page,
                packed.pages,
                packed.offsets,
                packed.slots,
                self._key_index,
                self._value_index,
            )


class PagedCall:
    """One call of vLLM's C++ paged kernel, prepared once per step and run for each layer.

    Args:
        plan: what is read.
        num_heads, num_kv_heads, head_size, dtype, isa: of the layers.
    """

    def __init__(
        self,
        plan: PagedPlan,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        isa: str,
    ) -> None:
        self._plan = plan
        self._table = torch.from_numpy(plan.block_table)
        self._staged_pages = plan.block_table[plan.staged]
        if plan.shifts is not None:
            self._shift_positions = torch.from_numpy(plan.shifts.positions)
            self._shift_of_queries = torch.from_numpy(plan.shifts.of_queries)
            self._shift_of_entries = torch.from_numpy(plan.shifts.of_entries)
        self._cos_sin: dict[Rotation, torch.Tensor] = {}
        self._seq_lens = torch.from_numpy(plan.seq_lens)
        self._query_start = torch.from_numpy(plan.query_start)
        self._schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(plan.requests),
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
        rotation: Rotation | None = None,
    ) -> None:
        """Attend ``query`` into ``output``, both ``[num_queries, num_heads, head_size]``.

        ``rotation`` is the layer's, in cache positions; ``None`` if it has none.
        """
        plan = self._plan
        cos_sin = self._cos_sin_of(rotation)
        if cos_sin is not None:
            assert rotation is not None
            query = rotation.rotate(query, cos_sin, self._shift_of_queries)
        if self._staged_pages.size:
            if self._staged_pages.size > pages.num_staging_pages:
                raise RuntimeError(
                    f"{self._staged_pages.size} staging pages are needed, "
                    f"{pages.num_staging_pages} were reserved: please report this"
                )
            # Staging pages are numbered from the layer's own first page.
            plan.block_table[plan.staged] = self._staged_pages + pages.first_staging_page
            if cos_sin is None:
                pages.stage(plan.merged, plan.packed)
            else:
                assert plan.packed is not None
                assert rotation is not None
                key, value = pages.gather(plan.packed)
                key = rotation.rotate(key, cos_sin, self._shift_of_entries)
                slots = plan.packed.slots + pages.first_staging_page * pages.block_size
                pages.write(key, value, torch.from_numpy(slots))
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
            block_table=self._table,
            softcap=logits_soft_cap,
            scheduler_metadata=self._schedule,
            s_aux=None,
        )

    def _cos_sin_of(self, rotation: Rotation | None) -> torch.Tensor | None:
        """Cosines and sines for the shifts of a step, made by the first layer that has it."""
        if rotation is None or self._plan.shifts is None:
            return None
        if rotation not in self._cos_sin:
            self._cos_sin[rotation] = rotation.cos_sin(self._shift_positions)
        return self._cos_sin[rotation]
