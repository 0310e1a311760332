"""What attention over two groups of pages reads: the contract of ``kept_decode`` and
``kept_prefill``."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Arguments of kernels that change from step to step. Triton compiles a kernel anew, which takes
# seconds, for a size of 1 and of a multiple of 16, and for a pointer to 16 bytes: not for these.
STEP_SIZES = ("num_reqs", "num_tokens")
STEP_INDEX = ("query_start", "seq_lens", "window_table", "kept_table")


@dataclass(frozen=True)
class PagedKV:
    """The pages of one layer, of both groups.

    Attributes:
        key, value: ``[num_pages, num_kv_heads, page_size, head_size]``, two views of one shape and
            one set of strides; the last dimension is contiguous.
        key_scale, value_scale: what stored elements are multiplied by; other than 1 only for FP8.

    Raises:
        ValueError: pages are of a size that does not divide tiles, nor tiles it.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"pages of {self.page_size} entries: must be a power of two")

    @property
    def page_size(self) -> int:
        """Entries of a page."""
        return self.key.shape[2]


@dataclass(frozen=True)
class KeptBatch:
    """Requests of a batch and what each of their tokens sees.

    The token at position ``p`` sees window positions ``[max(0, p - window_size + 1), p]`` and, with
    ``(start, limit)`` of ``stream_ranges``, stream entries ``[start, limit)``. With a bound on
    separators it also sees the entries of the sinks, ``[0, min(num_sinks, limit))``, and ``start``
    is no less than that.

    Attributes:
        query_start: ``[num_reqs + 1]`` int32, where each request's tokens begin in the batch; a
            request may have none.
        seq_lens: ``[num_reqs]`` int32, tokens, those of the batch included: the last token of a
            request is at position ``seq_len - 1``.
        window_table: ``[num_reqs, *]`` int32, page of each ``page_size`` positions; pages behind
            the window may be anything.
        kept_table: ``[num_reqs, *]`` int32, page of each ``page_size`` stream entries.
        stream_ranges: ``[num_tokens, 2]`` int32, entries; neither decreases within a request.
        window_size: tokens, the query's own included.
        num_sinks: entries; 0 where separators are not bounded, sinks then being part of the range.
        max_query_len: no request has more tokens in the batch.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    window_table: torch.Tensor
    kept_table: torch.Tensor
    stream_ranges: torch.Tensor
    window_size: int
    num_sinks: int
    max_query_len: int
