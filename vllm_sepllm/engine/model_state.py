"""Token ids of the V2 model runner, by its own seam for what a model needs beside the usual."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.checks import OTHER_BACKEND
from vllm_sepllm.engine.cpu_metadata import KeptMetadataBuilder
from vllm_sepllm.engine.cpu_plan import IntArray
from vllm_sepllm.engine.device_rows import DeviceRows
from vllm_sepllm.engine.gpu_metadata import GPUKeptMetadataBuilder
from vllm_sepllm.engine.kept_rows import KeptRows
from vllm_sepllm.engine.settings import kept_policy
from vllm_sepllm.policy import CountArray


class SepLLMModelState(DefaultModelState):
    """vLLM's state of a model, and the kept tokens of each request.

    Rows are the runner's own request indices. A request that resumes is added anew, with the
    ids of all tokens it has. A subclass counts on one kind of hardware.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows = self.make_rows()
        self._known: set[str] = set()

    @abstractmethod
    def make_rows(self) -> KeptRows | DeviceRows:
        """Rows for as many requests as the runner has."""

    @abstractmethod
    def batch_tokens(self, input_batch: InputBatch | None) -> BatchTokens | None:
        """Token ids for the builders; of a batch of vLLM's own making if there is none.

        ``None`` leaves the batch without attention metadata.
        """

    @classmethod
    def replace(cls, runner: GPUModelRunner) -> None:
        """Put one in the place of the state a V2 runner has made for its model.

        Raises:
            ConfigError: the model needs a state of its own.
        """
        found = type(runner.model_state)
        if found is not DefaultModelState:
            raise ConfigError(
                f"the model needs a {found.__name__}, SepLLM attention serves models with a plain "
                f"KV cache: {OTHER_BACKEND}"
            )
        runner.model_state = cls(
            runner.vllm_config, runner.model, runner.encoder_cache, runner.device
        )

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Count the tokens that are computed of a request that is new or resumes."""
        super().add_request(req_index, new_req_data)
        self._known.add(new_req_data.req_id)
        token_ids = new_req_data.prefill_token_ids
        assert token_ids is not None
        computed = np.asarray(token_ids[: new_req_data.num_computed_tokens], dtype=np.int32)
        self._rows.restart(req_index, computed)

    def remove_request(self, req_id: str) -> None:
        """Forget a request that ended or was preempted."""
        super().remove_request(req_id)
        self._known.discard(req_id)

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> Any:
        """Metadata of a batch, of which vLLM makes some itself, of requests it never added."""
        is_real = input_batch.req_ids[0] in self._known
        tokens = self.batch_tokens(input_batch if is_real else None)
        if tokens is None:
            return None
        return super().prepare_attn(
            input_batch, *args, **kwargs, model_specific_attn_metadata=tokens
        )


class BatchTokens(ModelSpecificAttnMetadata):
    """Token ids of one batch, handed to the builder of the kept group.

    Attributes:
        rows: of all requests.
        builder_class: of the kept group.
    """

    builder_class: ClassVar[type[Any]]

    def __init__(self, rows: Any, input_batch: InputBatch | None) -> None:
        self.rows = rows
        self.input_batch = input_batch

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        """Arguments of ``build``, for the builder of the kept group only."""
        is_kept = isinstance(attn_metadata_builder, self.builder_class)
        return {"tokens": self} if is_kept else {}


class CPUBatchTokens(BatchTokens):
    """On CPU; see :class:`vllm_sepllm.engine.kept_rows.StepTokens`."""

    builder_class = KeptMetadataBuilder
    rows: KeptRows

    def count(self, num_reqs: int, query_start: CountArray, stops: IntArray) -> IntArray:
        """Count the step's tokens."""
        batch = self.input_batch
        assert batch is not None
        query_start = query_start[: batch.num_reqs + 1]
        starts = stops[: batch.num_reqs] - (query_start[1:] - query_start[:-1])
        rows = batch.idx_mapping_np[: batch.num_reqs]
        self.rows.count(rows, batch.input_ids.numpy(), query_start, starts)
        return rows


class SepLLMCPUModelState(SepLLMModelState):
    """Counts on CPU."""

    _rows: KeptRows

    def make_rows(self) -> KeptRows:
        """Rows of whole requests."""
        policy = kept_policy(self.vllm_config)
        return KeptRows(policy, self.max_num_reqs, self.model_config.max_model_len)

    def batch_tokens(self, input_batch: InputBatch | None) -> CPUBatchTokens | None:
        """Token ids for the builders; nothing is attended to in a batch of vLLM's own making."""
        return CPUBatchTokens(self._rows, input_batch) if input_batch is not None else None


class DeviceBatchTokens(BatchTokens):
    """On a GPU; see :class:`vllm_sepllm.engine.device_rows.DeviceTokens`."""

    builder_class = GPUKeptMetadataBuilder
    rows: DeviceRows

    def step(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Ids of the step's tokens and row of each request."""
        batch = self.input_batch
        return None if batch is None else (batch.input_ids, batch.idx_mapping)


class SepLLMGPUModelState(SepLLMModelState):
    """Counts on the device. Batches of vLLM's own making have metadata too: they are what CUDA
    graphs are captured from."""

    _rows: DeviceRows

    def make_rows(self) -> DeviceRows:
        """Rows of what a step needs."""
        return DeviceRows(
            kept_policy(self.vllm_config),
            self.max_num_reqs,
            self.model_config.max_model_len,
            self.max_num_tokens,
            2 * self.vllm_config.num_speculative_tokens,  # of two steps in flight
            self.device,
        )

    def batch_tokens(self, input_batch: InputBatch | None) -> DeviceBatchTokens:
        """Token ids for the builders."""
        return DeviceBatchTokens(self._rows, input_batch)
