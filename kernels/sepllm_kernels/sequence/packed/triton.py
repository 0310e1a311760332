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
    _packed_deltas,
    _packed_key_gradient,
    _packed_query_gradient,
)
from sepllm_kernels.sequence.packed.kernels import _packed_forward
from sepllm_kernels.sequence.packed.plan import PackedPlan

DELTA_ROWS = 64


@dataclass(frozen=True)
class TiledLaunch(Launch):
    """How a kernel is compiled: ``rows`` are tokens of a program, or of a step of its loop.

    Attributes:
        tile: entries of a step of its loop, or of a program.
    """

    tile: int = 64

    @property
    def options(self) -> dict[str, int]:
        """Triton's, and what the kernel is compiled for."""
        return {**super().options, "ROWS": self.rows, "TILE": self.tile}


# The best one first, which is that of an H200 (`make gpu-tune`). The very last is for heads of 256
# in float32 where a program has 99 KiB.
LAST = TiledLaunch(32, 4, 1), TiledLaunch(32, 4, 1, tile=32), TiledLaunch(16, 4, 1, tile=16)
FORWARD = TiledLaunch(64, 4, 2), *LAST
QUERY_GRADIENT = KEY_GRADIENT = TiledLaunch(64, 4, 3), TiledLaunch(64, 4, 2), *LAST
# Of heads that are larger than 64, not tuned: accumulators take more registers.
WIDE_FORWARD = TiledLaunch(128, 8, 3), TiledLaunch(64, 4, 3), TiledLaunch(64, 4, 2), *LAST
WIDE_GRADIENT = TiledLaunch(64, 8, 3), TiledLaunch(64, 8, 2), TiledLaunch(32, 4, 2), *LAST


@dataclass(frozen=True)
class Call:
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
        """What every kernel is compiled for."""
        num_heads, head_size = self.query.shape[1:]
        group = num_heads // self.key.shape[1]
        return {"GROUP": group, "NUM_HEADS": num_heads, "HEAD_SIZE": head_size}

    def kept(self) -> list[torch.Tensor]:
        """Keys and values of the stream."""
        return [tensor.index_select(0, self.plan.kept) for tensor in (self.key, self.value)]

    def launch(
        self, name: str, launches: tuple[TiledLaunch, ...], kernel: Any, grid: Any, *arguments: Any
    ) -> None:
        """Run a kernel; ``grid`` follows from its launch."""

        if self.query.shape[2] > 64:
            launches = WIDE_FORWARD if kernel is _packed_forward else WIDE_GRADIENT

        def run(launch: Any) -> None:
            options = {**self.constants, **launch.options}
            with torch.cuda.device_of(self.query):  # of several GPUs, the tensors' own
                kernel[grid(launch)](*arguments, **options)

        shapes = self.query.dtype, *self.constants.values(), self.plan.sinks is None
        launch_first_that_fits((name, self.query.device, *shapes), launches, run)

    def by_blocks(self, launch: TiledLaunch) -> tuple[int, int]:
        """A program for each block of tokens and head."""
        return triton.cdiv(self.plan.num_tokens, launch.rows), self.query.shape[1]

    def forward(self, kept: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, ``[num_tokens, num_heads, head_size]``, and of each token and head the
        logarithm of the sum of weights, float32."""
        output = torch.empty(self.query.shape, dtype=self.query.dtype, device=self.query.device)
        log_sums = output.new_empty(output.shape[:2], dtype=torch.float32)
        plan, strides = self.plan, (*self.query.stride()[:2], *self.key.stride()[:2])
        tensors = self.query, self.key, self.value, *kept, output, log_sums
        ranges = plan.window_first, plan.stream, plan.sinks, plan.num_tokens
        arguments = *tensors, *ranges, *strides, self.factor
        self.launch("packed_forward", FORWARD, _packed_forward, self.by_blocks, *arguments)
        return output, log_sums

    def deltas(self, output: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """Products of result and gradient, ``[num_tokens, num_heads]`` float32."""
        num_tokens, num_heads, head_size = output.shape
        found = output.new_empty(num_tokens, num_heads, dtype=torch.float32)
        sizes = {"NUM_HEADS": num_heads, "HEAD_SIZE": head_size, "ROWS": DELTA_ROWS}
        grid = (triton.cdiv(num_tokens * num_heads, DELTA_ROWS),)
        with torch.cuda.device_of(output):
            _packed_deltas[grid](output, grad, found, num_tokens, **sizes)
        return found

    def query_gradient(self, kept: list[torch.Tensor], given: tuple[torch.Tensor, ...]) -> Any:
        """Of the queries; ``given`` as for :meth:`tile_gradients`."""
        found = torch.empty(self.query.shape, dtype=self.query.dtype, device=self.query.device)
        plan, strides = self.plan, (*self.query.stride()[:2], *self.key.stride()[:2])
        tensors = self.query, self.key, self.value, *kept, *given, found
        ranges = plan.window_first, plan.stream, plan.sinks, plan.num_tokens
        arguments = *tensors, *ranges, *strides, self.factor, self.scale
        kernel = _packed_query_gradient
        self.launch("packed_query_gradient", QUERY_GRADIENT, kernel, self.by_blocks, *arguments)
        return found

    def key_gradients(
        self, kept: list[torch.Tensor], given: tuple[torch.Tensor, ...]
    ) -> list[torch.Tensor]:
        """Of keys and values; ``given`` as for :meth:`tile_gradients`."""
        plan = self.plan
        if not len(plan.kept):
            windows = plan.window_first, plan.seen_in_window, None, None
            return self.tile_gradients(self.key, self.value, given, windows, None)
        ranges: tuple[torch.Tensor | None, ...] = plan.stream, plan.seen_in_stream, None, None
        if plan.sinks is not None:
            ranges = plan.stream, plan.seen_in_stream, plan.sinks, plan.seen_as_sink
        keys, values = kept
        in_stream = self.tile_gradients(keys, values, given, ranges, None)
        windows = plan.window_first, plan.seen_in_window, None, None
        return self.tile_gradients(self.key, self.value, given, windows, in_stream)

    def tile_gradients(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        given: tuple[torch.Tensor, ...],
        ranges: tuple[torch.Tensor | None, ...],
        in_stream: list[torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        """Of keys and values, as far as tokens see them in the stream (float32), or in windows.

        Args:
            keys, values: of the stream, or of all tokens.
            given: the gradient that comes, and of each token and head the logarithm of the sum of
                weights and the product of result and gradient.
            ranges: what tokens see of them, and what sees them; of the sinks too, or ``None``.
            in_stream: what was found for the stream: it is added.
        """
        plan, is_stream = self.plan, ranges[0] is self.plan.stream
        dtype = torch.float32 if is_stream else keys.dtype
        found = [torch.empty(keys.shape, dtype=dtype, device=keys.device) for _ in range(2)]
        added = (None, None, None) if in_stream is None else (*in_stream, plan.stream_entry)
        sizes = plan.num_tokens, len(keys), *self.query.stride()[:2], *keys.stride()[:2]
        tensors = self.query, keys, values, *given, *found, *added
        arguments = *tensors, *ranges, *sizes, self.factor, self.scale, is_stream

        def by_tiles(launch: TiledLaunch) -> tuple[int, int]:
            return triton.cdiv(len(keys), launch.tile), keys.shape[1]

        name = f"packed_key_gradient {is_stream} {in_stream is None}"
        self.launch(name, KEY_GRADIENT, _packed_key_gradient, by_tiles, *arguments)
        return found


class PackedAttention(torch.autograd.Function):
    """See :func:`packed_attention_triton`."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, plan: PackedPlan, scale: float) -> Any:
        """Kept are queries, keys, values, the result, and one number for each query and head."""
        query, key, value = (_side_by_side(tensor) for tensor in (query, key, value))
        if key.stride() != value.stride():
            key, value = key.contiguous(), value.contiguous()
        call = Call(query, key, value, plan, scale)
        output, log_sums = call.forward(call.kept())
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.plan, ctx.scale = plan, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Gradients of query, key and value."""
        query, key, value, output, log_sums = ctx.saved_tensors
        call = Call(query, key, value, ctx.plan, ctx.scale)
        grad = grad.contiguous()
        given = grad, log_sums, call.deltas(output, grad)
        kept = call.kept()
        return call.query_gradient(kept, given), *call.key_gradients(kept, given), None, None


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
