"""``kept_prefix`` of every request of a GPU worker, on the device.

A row is a ring: only the counts of a request's window and of the step being computed are needed, so
its size does not depend on the length of requests. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from sepllm_kernels.kept_metadata import kept_metadata
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_sepllm.engine.startup.settings import Settings
from vllm_sepllm.engine.worker.counts import TokenArray
from vllm_sepllm.policy import KeepRule


class DeviceCounts:
    """Kept tokens below each recent position, a row per request; see
    :class:`vllm_sepllm.engine.worker.counts.Counts`.

    Args:
        rule: which tokens are kept.
        max_num_reqs: rows.
        max_model_len: tokens of a request.
        max_step_tokens: tokens of a request in one step.
        max_rejected: tokens of a step that may be computed again in the next: rejected drafts.
        device: of the table.
    """

    def __init__(
        self,
        rule: KeepRule,
        max_num_reqs: int,
        max_model_len: int,
        max_step_tokens: int,
        max_rejected: int,
        device: torch.device,
    ) -> None:
        self.rule = rule
        self._token_codes = torch.from_numpy(rule.token_codes.copy()).to(device)
        recent = rule.window_size + max_step_tokens + max_rejected
        ring = min(max_model_len, recent) + 1
        self._kept_prefix = torch.zeros(max_num_reqs, ring, dtype=torch.int32, device=device)
        self._span_left: torch.Tensor | None = None
        if rule.spans is not None:
            self._span_left = torch.zeros(max_num_reqs, ring, dtype=torch.uint8, device=device)

    @classmethod
    def of(cls, vllm_config: VllmConfig, device: torch.device) -> DeviceCounts:
        """Counts of a worker."""
        scheduler = vllm_config.scheduler_config
        return cls(
            Settings.of(vllm_config).rule,
            scheduler.max_num_seqs,
            vllm_config.model_config.max_model_len,
            scheduler.max_num_batched_tokens,
            2 * vllm_config.num_speculative_tokens,  # of two steps in flight
            device,
        )

    def __len__(self) -> int:
        return len(self._kept_prefix)

    def restart(self, row: int, token_ids: TokenArray) -> None:
        """Give a row to a request whose first ``[num_tokens]`` ids are computed already."""
        below = np.zeros(len(token_ids) + 1, dtype=np.int32)
        flags, lefts = self.rule.kept_flags_along(token_ids, 0)
        np.cumsum(flags, out=below[1:])
        self._write(self._kept_prefix[row], below)
        if self._span_left is not None and lefts is not None:
            self._write(self._span_left[row], np.concatenate([np.zeros(1, np.uint8), lefts]))

    def _write(self, row: torch.Tensor, values: npt.NDArray[np.generic]) -> None:
        """Write values of positions ``[num_positions]`` to a ring, as far as it holds them."""
        ring, stop = len(row), len(values)
        recent = np.arange(max(0, stop - ring), stop)
        held = np.zeros(min(ring, stop), dtype=values.dtype)
        held[recent % ring] = values[recent]
        async_tensor_h2d(held, out=row[: len(held)])

    def step(self, index: torch.Tensor, token_ids: torch.Tensor) -> DeviceStep:
        """See :class:`vllm_sepllm.engine.worker.counts.Counts`."""
        return DeviceStep(self, index, token_ids)

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
        shifts: torch.Tensor | None = None,
    ) -> None:
        """Count a step's tokens; see :func:`sepllm_kernels.kept_metadata.kept_metadata`.

        It starts from the counts before the step and writes those behind its tokens alone, so
        counting twice is as good as once. What comes of it for one group, its slots, is written to
        the arguments.
        """
        kept_metadata(
            token_ids,
            query_start,
            seq_lens,
            rows,
            kept_table,
            self._token_codes,
            self._kept_prefix,
            stream_slots,
            stream_ranges,
            num_sink_tokens=self.rule.num_sink_tokens,
            window_size=self.rule.window_size,
            page_size=page_size,
            interval=self.rule.interval,
            max_separator_tokens=self.rule.max_separator_tokens,
            shifts=shifts,
            span_left=self._span_left,
        )


@dataclass(frozen=True)
class DeviceStep:
    """One step, for the builders of all kept groups. Each has it counted again, to the same end.

    Attributes:
        counts: of all requests.
        index: ``[num_reqs]`` int, row of each request, on the device.
        token_ids: int32, of all requests one after the other, on the device.
    """

    counts: DeviceCounts
    index: torch.Tensor
    token_ids: torch.Tensor
