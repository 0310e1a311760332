"""``packed_attention`` on a GPU, in Triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from sepllm_kernels.paged.launches import Launch, launch_first_that_fits
from sepllm_kernels.paged.tiles import LOG2_E
from sepllm_kernels.sequence.packed.gradient_kernels import (
    _packed_key_gradient,
    _packed_query_gradient,
)
from sepllm_kernels.sequence.packed.kernels import _packed_forward
from sepllm_kernels.sequence.packed.plan import PackedPlan

TILE = 64  # entries of a tile
# Rows are tokens of a program, or of a step of its loop.
FORWARD = Launch(128, 8, 3), Launch(64, 4, 3), Launch(64, 4, 2), Launch(32, 4, 1)
BACKWARD = Launch(64, 8, 3), Launch(64, 8, 2), Launch(32, 4, 2), Launch(32, 4, 1)


@dataclass(frozen=True)
class _Call:
    """What all kernels of one layer are given.

    Attributes:
        query: ``[num_tokens, num_heads, head_size]``.
        key, value: ``[num_tokens, num_kv_heads, head_size]``, of one set of strides.
        plan: what each token sees.
        scale: factor on the logits.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    plan: PackedPlan
    scale: float

    @property
    def factor(self) -> float:
        """On the logits, whose exponentials are taken in powers of two."""
        return self.scale * float(LOG2_E.value)

    @property
    def constants(self) -> dict[str, int]:
        num_heads, head_size = self.query.shape[1:]
        group = num_heads // self.key.shape[1]
        return {"GROUP": group, "NUM_HEADS": num_heads, "HEAD_SIZE": head_size, "TILE": TILE}

    def kept(self) -> list[torch.Tensor]:
        """Keys and values of the stream."""
        return [tensor.index_select(0, self.plan.kept) for tensor in (self.key, self.value)]

    def launch(
        self, name: str, launches: tuple[Launch, ...], kernel: Any, grid: Any, *arguments: Any
    ) -> None:
        """Run a kernel; ``grid`` follows from its launch."""

        def run(launch: Launch) -> None:
            options = {**self.constants, "ROWS": launch.rows, **launch.options}
            with torch.cuda.device_of(self.query):  # of several GPUs, the tensors' own
                kernel[grid(launch)](*arguments, **options)

        shapes = self.query.dtype, *self.constants.values(), self.plan.sinks is None
        launch_first_that_fits((name, self.query.device, *shapes), launches, run)

    def by_blocks(self, launch: Launch) -> tuple[int, int]:
        """A program for each block of tokens and head."""
        return triton.cdiv(self.plan.num_tokens, launch.rows), self.query.shape[1]

    def query_gradient(self, kept: list[torch.Tensor], given: tuple[torch.Tensor, ...]) -> Any:
        """Of the queries; ``given`` as for :meth:`tile_gradients`."""
        found = torch.empty(self.query.shape, dtype=self.query.dtype, device=self.query.device)
        plan, strides = self.plan, (*self.query.stride()[:2], *self.key.stride()[:2])
        tensors = self.query, self.key, self.value, *kept, *given, found
        ranges = plan.window_first, plan.stream, plan.sinks, plan.num_tokens
        arguments = *tensors, *ranges, *strides, self.factor, self.scale
        kernel = _packed_query_gradient
        self.launch("packed_query_gradient", BACKWARD, kernel, self.by_blocks, *arguments)
        return found

    def tile_gradients(
        self, kept: list[torch.Tensor] | None, given: tuple[torch.Tensor, ...]
    ) -> list[torch.Tensor]:
        """Of keys and values in float32, as far as tokens see them in the stream, or in windows.

        Args:
            kept: keys and values of the stream; ``None`` is those of all tokens.
            given: the gradient that comes, and of each token and head the logarithm of the sum of
                weights and the product of result and gradient.
        """
        plan = self.plan
        keys, values = (self.key, self.value) if kept is None else kept
        found = [torch.empty(keys.shape, dtype=torch.float32, device=keys.device) for _ in range(2)]
        if not len(keys):
            return found
        ranges: tuple[torch.Tensor | None, ...]
        if kept is None:
            ranges = plan.window_first, plan.seen_in_window, None, None
        elif plan.sinks is None:
            ranges = plan.stream, plan.seen_in_stream, None, None
        else:
            ranges = plan.stream, plan.seen_in_stream, plan.sinks, plan.seen_as_sink
        sizes = plan.num_tokens, len(keys), *self.query.stride()[:2], *keys.stride()[:2]
        tensors = self.query, keys, values, *given, *found
        arguments = *tensors, *ranges, *sizes, self.factor, self.scale, kept is not None

        def by_tiles(launch: Launch) -> tuple[int, int]:
            return triton.cdiv(len(keys), TILE), keys.shape[1]

        name = "packed_key_gradient", kept is None
        self.launch(str(name), BACKWARD, _packed_key_gradient, by_tiles, *arguments)
        return found


class PackedAttention(torch.autograd.Function):
    """See :func:`packed_attention_triton`."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, plan: PackedPlan, scale: float) -> Any:
        """Kept are queries, keys, values, the result, and one number for each query and head."""
        query, key, value = (_side_by_side(tensor) for tensor in (query, key, value))
        if key.stride() != value.stride():
            key, value = key.contiguous(), value.contiguous()
        call = _Call(query, key, value, plan, scale)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        log_sums = output.new_empty(query.shape[:2], dtype=torch.float32)
        tensors = query, key, value, *call.kept(), output, log_sums
        ranges = plan.window_first, plan.stream, plan.sinks, plan.num_tokens
        arguments = *tensors, *ranges, *query.stride()[:2], *key.stride()[:2], call.factor
        call.launch("packed_forward", FORWARD, _packed_forward, call.by_blocks, *arguments)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Gradients of query, key and value."""
        query, key, value, output, log_sums = ctx.saved_tensors
        call = _Call(query, key, value, ctx.plan, ctx.scale)
        grad = grad.contiguous()
        given = grad, log_sums, (output.float() * grad.float()).sum(-1)
        kept = call.kept()
        in_window, in_stream = call.tile_gradients(None, given), call.tile_gradients(kept, given)
        for every, of_kept in zip(in_window, in_stream, strict=True):
            every[call.plan.kept] += of_kept  # each place once: no sum of several programs
        found = call.query_gradient(kept, given)
        return found, in_window[0].to(key.dtype), in_window[1].to(value.dtype), None, None


def packed_attention_triton(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: PackedPlan, scale: float
) -> torch.Tensor:
    """Attend each token of texts to its window and to its part of the stream of kept tokens.

    Arguments and result as :func:`packed_attention_reference`, on a GPU, in float32, float16 or
    bfloat16. Once differentiable.
    """
    apply: Callable[..., torch.Tensor] = PackedAttention.apply
    return apply(query, key, value, plan, scale)


def _side_by_side(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
