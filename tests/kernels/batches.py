"""Random batches over two groups of pages, as an engine would leave them.

Everything no token of the batch may read is NaN: pages of nobody, the rest of pages that are not
full, positions that left the window, stream entries behind the last limit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from sepllm_kernels.batch import KeptBatch, PagedKV

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
SLACK_PAGES = 5


@dataclass(frozen=True)
class Shape:
    """Of the layer and its pages."""

    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None  # FP8 pages

    @property
    def scale(self) -> float:
        return float(self.head_size) ** -0.5


@dataclass(frozen=True)
class Request:
    """``num_tokens`` of ``seq_len`` are in the batch; ``kept`` flags all ``seq_len``."""

    seq_len: int
    num_tokens: int
    kept: torch.Tensor

    @staticmethod
    def random(seq_len: int, num_tokens: int, share: float, rng: torch.Generator) -> Request:
        return Request(seq_len, num_tokens, torch.rand(seq_len, generator=rng) < share)

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.seq_len - self.num_tokens, self.seq_len)

    @property
    def kept_prefix(self) -> torch.Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.long), self.kept.long().cumsum(0)])


@dataclass(frozen=True)
class Case:
    """Arguments of attention, and the dense tensors they were made from."""

    queries: torch.Tensor
    pages: PagedKV
    batch: KeptBatch
    shape: Shape
    requests: list[Request]
    keys: list[torch.Tensor]  # [seq_len, num_kv_heads, head_size] of each request, float32
    values: list[torch.Tensor]
    max_separators: int | None = None
    num_sinks: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(request.num_tokens for request in self.requests)

    def empty_output(self) -> torch.Tensor:
        shape = (self.queries.shape[-3], *self.queries.shape[-2:])
        return torch.full(shape, NAN, dtype=self.shape.dtype, device=DEVICE)


def make_case(
    requests: list[Request],
    window_size: int,
    shape: Shape | None = None,
    *,
    max_separators: int | None = None,
    num_sinks: int = 0,
    padding: int = 0,
    heads_first: bool = True,
    seed: int = 0,
) -> Case:
    """Pages are handed out in random order. ``padding`` adds requests without tokens, and as many
    tokens of no request."""
    shape = shape or Shape()
    rng = torch.Generator().manual_seed(seed)
    size, tables = shape.page_size, []
    ranges, keys, values = [], [], []
    num_pages = sum(2 * (r.seq_len // size + 1) for r in requests) + SLACK_PAGES
    free = iter((torch.randperm(num_pages - 1, generator=rng) + 1).tolist())
    stored = torch.full((num_pages, 2, shape.num_kv_heads, size, shape.head_size), NAN)
    longest = max((r.seq_len for r in requests), default=0)
    width = longest // size + 2
    tables = torch.zeros(2, len(requests) + padding, width, dtype=torch.int32)
    for index, request in enumerate(requests):
        dense = torch.randn(2, request.seq_len, shape.num_kv_heads, shape.head_size, generator=rng)
        if shape.kv_dtype is not None:
            dense = dense.to(shape.kv_dtype).float()
        dense = dense.to(shape.dtype).float()
        keys.append(dense[0])
        values.append(dense[1])
        prefix = request.kept_prefix
        limits = prefix[(request.positions - window_size + 1).clamp(min=0)]
        begins = torch.zeros_like(limits)
        if max_separators is not None:
            begins = torch.maximum(limits.clamp(max=num_sinks), limits - max_separators)
        ranges.append(torch.stack([begins, limits], 1))
        first = int((request.positions - window_size + 1).clamp(min=0).min()) if len(limits) else 0
        in_window = range(first, request.seq_len) if len(limits) else range(0)
        last = int(limits.max()) if len(limits) else 0
        entries = request.kept.nonzero()[:, 0].tolist()
        first_entry = int(begins.min()) if len(limits) else 0
        seen = [e for e in range(last) if e < num_sinks or e >= first_entry]
        for table, places in (
            (tables[0, index], [(p, p) for p in in_window]),
            (tables[1, index], [(e, entries[e]) for e in seen]),
        ):
            for place, position in places:
                if table[place // size] == 0:
                    table[place // size] = next(free)
                stored[int(table[place // size]), :, :, place % size] = dense[:, position]
    lengths = [r.num_tokens for r in requests] + [0] * padding
    query_start = torch.tensor([0, *lengths]).cumsum(0)
    batch = KeptBatch(
        query_start=query_start.int().to(DEVICE),
        seq_lens=torch.tensor([*(r.seq_len for r in requests), *[0] * padding]).int().to(DEVICE),
        window_table=tables[0].to(DEVICE),
        kept_table=tables[1].to(DEVICE),
        stream_ranges=torch.cat([*ranges, torch.zeros(padding, 2).long()]).int().to(DEVICE),
        window_size=window_size,
        num_sinks=num_sinks if max_separators is not None else 0,
        max_query_len=max(lengths, default=1),
    )
    num_tokens = int(query_start[-1]) + padding
    queries = torch.randn(num_tokens, shape.num_heads, shape.head_size, generator=rng)
    pages = make_pages(stored, shape, heads_first)
    queries = queries.to(shape.dtype).to(DEVICE)
    return Case(queries, pages, batch, shape, requests, keys, values, max_separators, num_sinks)


def make_pages(stored: torch.Tensor, shape: Shape, heads_first: bool = True) -> PagedKV:
    """``[pages, 2, heads, entries, size]`` as vLLM lays pages out: keys and values of an entry side
    by side, heads before entries or behind."""
    dtype = shape.kv_dtype or shape.dtype
    packed = torch.cat([stored[:, 0], stored[:, 1]], -1).to(dtype)  # [pages, heads, entries, 2 D]
    if not heads_first:
        packed = packed.transpose(1, 2).contiguous().transpose(1, 2)
    key, value = packed.to(DEVICE).split(shape.head_size, -1)
    return PagedKV(key, value)


def far_apart(pages: PagedKV, dim: int = 0) -> PagedKV:
    """The same pages in a cache so large that 32 bits do not hold where the last page, or with a
    ``dim`` of 1 the last head, lies. What is between them is never touched."""
    distance = (1 << 32) // (pages.key.shape[dim] - 1) // 32 * 32
    buffer = pages.key.new_empty(pages.key.shape[dim] * distance)
    strides = list(pages.key.stride())
    strides[dim] = distance
    key = buffer.as_strided(pages.key.shape, strides)
    value = buffer.as_strided(pages.key.shape, strides, distance // 2)
    key.copy_(pages.key)
    value.copy_(pages.value)
    return replace(pages, key=key, value=value)


def explicit_mask(case: Case, request: Request) -> torch.Tensor:
    """``[num_tokens, seq_len]``: a key is visible if inside the window, or kept and, with a bound,
    a sink or among the newest separators behind the window."""
    query, key = request.positions[:, None], torch.arange(request.seq_len)[None, :]
    in_window = (key <= query) & (key > query - case.batch.window_size)
    behind = request.kept[None, :] & (key <= query - case.batch.window_size)
    if case.max_separators is not None:
        newer = behind.flip(1).cumsum(1).flip(1)  # kept ones behind the window from here on
        is_sink = key < case.num_sinks
        behind = behind & (is_sink | (newer <= case.max_separators))
    return in_window | behind


def dense_attention(
    case: Case, logits_soft_cap: float = 0.0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """All tokens of the batch under the explicit mask, in torch, from the dense tensors."""
    group = case.shape.num_heads // case.shape.num_kv_heads
    results, start = [], 0
    for request, key, value in zip(case.requests, case.keys, case.values, strict=True):
        query = case.queries[start : start + request.num_tokens].cpu().to(dtype).transpose(0, 1)
        start += request.num_tokens
        k, v = (
            x.to(dtype).repeat_interleave(group, 1).transpose(0, 1)
            for x in (key * case.pages.key_scale, value * case.pages.value_scale)
        )
        mask = explicit_mask(case, request)
        if logits_soft_cap:
            logits = query @ k.transpose(1, 2) * case.shape.scale
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
            result = logits.masked_fill(~mask, float("-inf")).softmax(-1) @ v
        else:
            result = torch.nn.functional.scaled_dot_product_attention(
                query, k, v, attn_mask=mask, scale=case.shape.scale
            )
        results.append(result.transpose(0, 1))
    return torch.cat(results)


def largest_logit(case: Case) -> float:
    """Over all tokens and keys, visible or not."""
    group, start, largest = case.shape.num_heads // case.shape.num_kv_heads, 0, 0.0
    for request, key in zip(case.requests, case.keys, strict=True):
        query = case.queries[start : start + request.num_tokens].cpu().float()
        start += request.num_tokens
        keys = key.repeat_interleave(group, 1) * case.pages.key_scale
        logits = torch.einsum("qhd,khd->hqk", query, keys) * case.shape.scale
        largest = max([largest, *logits.abs().flatten().tolist()])
    return largest


def check_close(
    case: Case,
    result: torch.Tensor,
    exact: torch.Tensor,
    same_dtype: torch.Tensor,
    more: float = 0.0,
) -> None:
    """No further from the exact result than twice what torch is in the same dtype, and roundings.

    They are that of one result as large as the largest, and those of float32 logits: a weight's
    relative error is its logit's absolute one. ``more`` is what an operation rounds besides.
    """
    value = max(float(x.abs().max()) for x in case.values if x.numel()) * case.pages.value_scale
    eps = torch.finfo(same_dtype.dtype).eps * float(exact.abs().max())
    eps += torch.finfo(torch.float32).eps * largest_logit(case) * value
    allowed = 2 * float((same_dtype.double() - exact).abs().max()) + eps + more
    error = (result.cpu().double() - exact).abs()
    assert not error.isnan().any(), "something was read that must not be, or not written"
    assert float(error.max()) <= allowed, f"error {float(error.max()):.3g}, allowed {allowed:.3g}"
