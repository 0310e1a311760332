"""``packed_attention`` on a CPU: torch's own attention, a part of the tokens at a time.

Each part reads the stream up to its last limit and its windows, laid side by side::

    keys of a part     [ stream 0 .. limit | window of its first token .. its last token ]

so the work follows what is visible. What torch would keep of every part for the backward pass grows
with the square of the length, so the passes are written out: what is kept is queries, keys, values,
the result and the logarithms of the sums of weights. The backward pass lays the keys side by side
once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from sepllm_kernels.sequence.packed.plan import PackedPlan, Part

# Tokens of a part. More read more of others' windows, fewer copy keys more often. Of 96 to 512, 192
# was fastest at 2,048 to 8,192 tokens with a window of 256 (AVX-512). Torch's kernel takes 64
# queries at a time from 192 on, and 32 below.
PART = 192


class PackedAttention(torch.autograd.Function):
    """See :func:`packed_attention_torch`."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, plan: PackedPlan, scale: float) -> Any:
        """Queries, keys and values as ``[heads, tokens, head size]`` inside."""
        if query.stride(2) != 1:  # torch's kernel reads heads as if they lay together
            query = query.contiguous()
        queries, keys, values = _by_head(query, key), key.transpose(0, 1), value.transpose(0, 1)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        outputs = _by_head(output, key)
        log_sums = query.new_empty(queries.shape[:3], dtype=_log_sum_type(query))
        stream = _Stream(plan, keys, values)
        for part, bias in part_biases(plan, PART, query.dtype):
            own = slice(part.first, part.stop)
            seen = stream.seen(part, queries.shape[0])
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries[:, :, own], *seen, attn_mask=bias, scale=scale
            )
            outputs[:, :, own], log_sums[:, :, own] = found
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Gradients of query, key and value."""
        query, key, value, output, log_sums = ctx.saved_tensors
        plan: PackedPlan = ctx.plan
        queries, keys, values = _by_head(query, key), key.transpose(0, 1), value.transpose(0, 1)
        grads, outputs = _by_head(grad, key), _by_head(output, key)
        grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
        grad_queries = _by_head(grad_query, key)
        stream = _Stream(plan, keys, values)
        sums = stream.gradients()
        for part, bias in part_biases(plan, PART, query.dtype):
            own = slice(part.first, part.stop)
            given = [tensor[:, :, own] for tensor in (grads, queries, outputs)]
            seen = stream.seen(part, queries.shape[0])
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                given[0],
                given[1],
                *seen,
                given[2],
                log_sums[:, :, own],
                0.0,
                False,
                attn_mask=bias,
                scale=ctx.scale,
            )
            grad_queries[:, :, own] = found[0]
            sums.add(part, *(_of_group(each) for each in found[1:]))
        return grad_query, *sums.total(), None, None


def packed_attention_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: PackedPlan, scale: float
) -> torch.Tensor:
    """Attend each token of texts to its window and to its part of the stream of kept tokens.

    Arguments and result as :func:`packed_attention_reference`, on a CPU, in float32, float64 or
    bfloat16. Once differentiable.
    """
    apply: Callable[..., torch.Tensor] = PackedAttention.apply
    result = apply(query, key, value, plan, scale)
    return result


def _log_sum_type(query: torch.Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _by_head(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """``[tokens, heads, size]`` seen as ``[heads of a KV head, KV heads, tokens, size]``."""
    num_tokens, num_heads, size = query.shape
    num_kv_heads = key.shape[1]
    shape = num_tokens, num_kv_heads, num_heads // num_kv_heads, size
    return query.reshape(shape).permute(2, 1, 0, 3)


def _of_group(grad: torch.Tensor) -> torch.Tensor:
    """What all heads of a KV head give, of ``[heads of a KV head, ...]``."""
    return grad[0] if grad.shape[0] == 1 else grad.sum(0)


def part_biases(
    plan: PackedPlan, tokens_of_a_part: int, dtype: torch.dtype
) -> Iterator[tuple[Part, torch.Tensor]]:
    """Parts, and what is added to the logits of each: 0 where a token sees, else minus infinity.

    Yields:
        A part and ``[1, 1, tokens of the part, entries and places that it sees]``, good until
        the next one is asked for: parts whose windows are alike have one tensor, whose end is right
        for each, and differ in some columns of the stream.
    """
    parts = list(plan.parts(tokens_of_a_part))
    most = max((part.num_entries for part in parts), default=0)
    windows, written = None, torch.zeros(0, dtype=dtype)
    for part in parts:
        if part.windows != windows:
            windows, window = part.windows, _window_bias(part.windows, dtype)
            written = torch.cat([window.new_zeros(len(window), most), window], 1)
        bias = written[:, most - part.num_entries :]
        hidden = list(_hidden_entries(plan, part))
        for columns, mask in hidden:
            bias[:, columns].masked_fill_(mask, -math.inf)
        yield part, bias[None, None]
        for columns, _ in hidden:
            bias[:, columns] = 0


def _hidden_entries(plan: PackedPlan, part: Part) -> Iterator[tuple[slice, torch.Tensor]]:
    """Columns of a part's entries that not all tokens see, and ``[tokens, columns]`` bool: which
    they do not."""
    own = slice(part.first, part.stop)
    at = 0
    for first, stop in part.entries:
        for low, high in _outside(first, stop, part.entries_of_all):
            entry = torch.arange(low, high, dtype=torch.int32)
            outside = [
                (entry < firsts[own, None]) | (entry >= limits[own, None])
                for firsts, limits in plan.ranges
            ]
            hidden = outside[0] if len(outside) == 1 else outside[0] & outside[1]
            yield slice(at + low - first, at + high - first), hidden
        at += stop - first


def _window_bias(windows: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The bias of windows alone, ``[tokens, places from the first window's first]``."""
    token = torch.arange(len(windows), dtype=torch.int32)[:, None]
    place = torch.arange(windows[0], len(windows), dtype=torch.int32)
    hidden = (place > token) | (place < torch.tensor(windows, dtype=torch.int32)[:, None])
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)


def _outside(first: int, stop: int, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What none of the ranges, which rise, holds of ``[first, stop)``."""
    for low, high in ranges:
        low, high = max(low, first), min(high, stop)
        if low < high:
            if first < low:
                yield first, low
            first = high
    if first < stop:
        yield first, stop


class _Stream:
    """Keys and values of the stream, ``[KV heads, entries, size]``, beside those of all tokens."""

    def __init__(self, plan: PackedPlan, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.plan = plan
        self._all = keys, values
        rows = [tensor.transpose(0, 1) for tensor in self._all]  # each lies together in memory
        kept = [each.index_select(0, plan.kept) for each in rows]
        self._kept = [each.transpose(0, 1).contiguous() for each in kept]

    def seen(self, part: Part, group: int) -> list[torch.Tensor]:
        """Keys and values of a part, the same ones for each head of a group: ``[group, KV heads,
        entries and places, size]``."""
        place = slice(part.window_first, part.stop)
        found = []
        for every, kept in zip(self._all, self._kept, strict=True):
            pieces = [kept[:, first:stop] for first, stop in part.entries]
            joined = torch.cat([*pieces, every[:, place]], 1)
            found.append(joined[None].expand(group, -1, -1, -1))
        return found

    def gradients(self) -> _Gradients:
        return _Gradients(self.plan, self._all, self._kept)


class _Gradients:
    """Gradients of keys and values, summed up over the parts."""

    def __init__(self, plan: PackedPlan, all_: Any, kept: Any) -> None:
        self._plan = plan
        self._dtype = kept[0].dtype
        wide = torch.promote_types(self._dtype, torch.float32)  # many parts are added up
        self._all = [torch.zeros(each.shape, dtype=wide) for each in all_]
        self._kept = [torch.zeros(each.shape, dtype=wide) for each in kept]

    def add(self, part: Part, *grads: torch.Tensor) -> None:
        """Add what a part gives, in the order of :meth:`_Stream.seen`."""
        place = slice(part.window_first, part.stop)
        sizes = [stop - first for first, stop in part.entries]
        for grad, every, kept in zip(grads, self._all, self._kept, strict=True):
            sizes_of_all = [*sizes, part.stop - part.window_first]
            *pieces, window = torch.split(grad, sizes_of_all, 1)
            for (first, stop), piece in zip(part.entries, pieces, strict=True):
                kept[:, first:stop] += piece
            every[:, place] += window

    def total(self) -> tuple[torch.Tensor, ...]:
        """``[tokens, KV heads, size]`` of keys and of values."""
        for every, kept in zip(self._all, self._kept, strict=True):
            every.index_add_(1, self._plan.kept, kept)
        return tuple(every.transpose(0, 1).to(self._dtype) for every in self._all)
