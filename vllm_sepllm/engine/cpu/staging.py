"""Copies into the staging pages, compiled by numba (which vLLM itself depends on).

A decode step copies a few kilobytes per request and layer. torch needs five kernel launches
for that, which at batch 1 cost more than the attention they prepare; one compiled loop does not.

Arrays hold bit patterns: ``flat`` is ``[num_pages, num_kv_heads, 2 * block_size * head_size]``
of unsigned integers as wide as an element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


def compiled(function: Callable[..., None]) -> Any:
    """``function``, to be compiled by numba at its first call, or read from numba's cache.

    On a read-only file system without a writable home there is no place for a cache.
    """
    options = {"nogil": True, "boundscheck": False}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError as error:  # numba looks for a place at once
        if "no locator available" not in str(error):
            raise
        logger.info_once(
            "SepLLM attention: numba finds no writable directory for its cache, so a few copies "
            "are compiled at every start, which takes seconds: NUMBA_CACHE_DIR may name one"
        )
        return njit(**options)(function)


@compiled
def merge_pages(
    flat: Any, first_staging_page: int, heads: Any, tails: Any, splits: Any, entry_of: Any
) -> None:
    """Fill one staging page per row from two pages.

    Args:
        flat: all pages.
        first_staging_page: where the staging pages begin in ``flat``.
        heads, tails, splits: ``[num_staged]`` int64; see ``MergedPages``.
        entry_of: ``[page elements of one head]`` int16, entry that each element is of.
    """
    for row in range(heads.shape[0]):
        split = np.int16(splits[row])  # as narrow as entry_of, or the loop is not vectorized
        for head in range(flat.shape[1]):
            old = flat[heads[row], head]
            new = flat[tails[row], head]
            out = flat[first_staging_page + row, head]
            for i in range(entry_of.shape[0]):
                from_old, from_new = old[i], new[i]  # both are read, so no branch remains
                out[i] = from_new if entry_of[i] < split else from_old


@compiled
def gather_entries(
    flat: Any, pages: Any, offsets: Any, key_index: Any, value_index: Any, keys: Any, values: Any
) -> None:
    """Copy single entries out of pages, to be rotated before they are staged.

    Args:
        flat: all pages.
        pages, offsets: ``[num_entries]`` int64; see ``PackedEntries``.
        key_index, value_index: ``[block_size, head_size]`` int64; see ``PageLayout``.
        keys, values: ``[num_entries, num_kv_heads, head_size]``, written.
    """
    for entry in range(pages.shape[0]):
        offset = offsets[entry]
        for head in range(flat.shape[1]):
            source = flat[pages[entry], head]
            key, value = keys[entry, head], values[entry, head]
            for i in range(key.shape[0]):
                key[i] = source[key_index[offset, i]]
                value[i] = source[value_index[offset, i]]


@compiled
def pack_entries(
    flat: Any,
    first_staging_page: int,
    pages: Any,
    offsets: Any,
    slots: Any,
    key_index: Any,
    value_index: Any,
) -> None:
    """Copy single entries to staging slots.

    Args:
        flat: all pages.
        first_staging_page: where the staging pages begin in ``flat``.
        pages, offsets, slots: ``[num_entries]`` int64; see ``PackedEntries``.
        key_index, value_index: ``[block_size, head_size]`` int64; see ``PageLayout``.
    """
    block_size, head_size = key_index.shape
    for entry in range(pages.shape[0]):
        offset = offsets[entry]
        page, to = divmod(slots[entry], block_size)
        for head in range(flat.shape[1]):
            source = flat[pages[entry], head]
            out = flat[first_staging_page + page, head]
            for i in range(head_size):
                out[key_index[to, i]] = source[key_index[offset, i]]
                out[value_index[to, i]] = source[value_index[offset, i]]
