"""``kept_prefix`` of every request of a GPU worker, on the device, and where token ids come from.

A row is a ring: only the counts of a request's window and of the step being computed are needed, so
its size does not depend on the length of requests. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from sepllm_kernels.kept_metadata import kept_metadata

from vllm_sepllm.engine.cpu_plan import IntArray
from vllm_sepllm.engine.kept_rows import RunnerTokens, TokenArray
from vllm_sepllm.policy import (
    BoolArray,
    FixedIntervalPolicy,
    KeptPolicy,
    SepLLMPolicy,
    StreamingPolicy,
)


class DeviceRows:
    """Kept tokens below each recent position, a row per request.

    Args:
        policy: which tokens are kept.
        max_num_reqs: rows.
        max_model_len: tokens of a request.
        max_step_tokens: tokens of a request in one step.
        max_rejected: tokens of a step that may be computed again in the next: rejected drafts.
        device: of the table.

    Raises:
        ValueError: the policy is none that the kernel knows.
    """

    def __init__(
        self,
        policy: KeptPolicy,
        max_num_reqs: int,
        max_model_len: int,
        max_step_tokens: int,
        max_rejected: int,
        device: torch.device,
    ) -> None:
        chosen = np.zeros(1, dtype=np.bool_)
        self._interval = 0
        if isinstance(policy, SepLLMPolicy):
            chosen = policy.is_separator
        elif isinstance(policy, FixedIntervalPolicy):
            self._interval = policy.interval
        elif not isinstance(policy, StreamingPolicy):
            raise ValueError(
                f"{type(policy).__name__} is not known to the Triton kernel kept_metadata: "
                "use another policy"
            )
        self.policy = policy
        self._is_chosen = torch.from_numpy(chosen.copy()).to(device)
        recent = policy.window_size + max_step_tokens + max_rejected
        ring = min(max_model_len, recent) + 1
        self._max_rejected = max_rejected
        self._kept_prefix = torch.zeros(max_num_reqs, ring, dtype=torch.int32, device=device)
        self._counted = np.zeros(max_num_reqs, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._kept_prefix)

    def restart(self, row: int, token_ids: TokenArray) -> None:
        """Give a row to a request whose first ``[num_tokens]`` ids are computed already."""
        num_tokens, ring = len(token_ids), self._kept_prefix.shape[1]
        below = np.zeros(num_tokens + 1, dtype=np.int32)
        np.cumsum(self.policy.kept_flags(token_ids), out=below[1:])
        recent = np.arange(max(0, num_tokens + 1 - ring), num_tokens + 1)
        counts = np.zeros(min(ring, num_tokens + 1), dtype=np.int32)
        counts[recent % ring] = below[recent]
        source = torch.from_numpy(counts)
        if self._kept_prefix.is_cuda:
            source = source.pin_memory()
        self._kept_prefix[row, : len(counts)].copy_(source, non_blocking=True)
        self._counted[row] = num_tokens

    def are_at(self, rows: IntArray, starts: IntArray) -> BoolArray:
        """Whether the counts a step needs that starts at these positions are held."""
        counted = self._counted[rows]
        return (starts <= counted) & (starts >= counted - self._max_rejected)

    def mark(self, rows: IntArray, stops: IntArray) -> None:
        """Note that the tokens of ``rows`` are counted up to positions ``stops``."""
        self._counted[rows] = stops

    def count(
        self,
        token_ids: torch.Tensor,
        rows: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        kept_table: torch.Tensor,
        page_size: int,
        stream_slots: torch.Tensor,
        stream_ranges: torch.Tensor,
        lags: torch.Tensor | None = None,
    ) -> None:
        """Count a step's tokens; see :func:`sepllm_kernels.kept_metadata.kept_metadata`."""
        kept_metadata(
            token_ids,
            query_start,
            seq_lens,
            rows,
            kept_table,
            self._is_chosen,
            self._kept_prefix,
            stream_slots,
            stream_ranges,
            num_sink_tokens=self.policy.num_sink_tokens,
            window_size=self.policy.window_size,
            page_size=page_size,
            interval=self._interval,
            max_separator_tokens=self.policy.max_separator_tokens,
            lags=lags,
        )


class DeviceTokens(Protocol):
    """The token ids of a step, for the builder of the kept group's metadata."""

    @property
    def rows(self) -> DeviceRows:
        """The rows of all requests."""

    def step(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Ids of the step's tokens and row of each request, both on the device; ``None`` for a
        batch of vLLM's own making, whose requests are none."""


class DeviceRunnerTokens(RunnerTokens):
    """Token ids of the V1 runner on a GPU, read from its own state."""

    rows: DeviceRows

    def __init__(self, rows: DeviceRows, runner: Any) -> None:
        super().__init__(rows, runner)
        self.is_dummy_run = False

    def step(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :class:`DeviceTokens`."""
        input_batch = self._runner.input_batch
        num_reqs = len(input_batch.req_ids)
        if self.is_dummy_run or num_reqs == 0:
            return None
        rows = self._assign(input_batch.req_ids, self._runner.requests)
        starts = input_batch.num_computed_tokens_cpu[:num_reqs].astype(np.int64)
        for i in (~self.rows.are_at(rows, starts)).nonzero()[0]:  # first seen, or resumed
            self.rows.restart(int(rows[i]), input_batch.token_ids_cpu[i, : starts[i]])
        query_start = self._runner.query_start_loc.np[: num_reqs + 1]
        self.rows.mark(rows, starts + query_start[1:] - query_start[:-1])
        index = torch.from_numpy(rows)
        token_ids = self._runner.input_ids.gpu
        if token_ids.is_cuda:
            index = index.pin_memory()
        return token_ids, index.to(token_ids.device, non_blocking=True)
