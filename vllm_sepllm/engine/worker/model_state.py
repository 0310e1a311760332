"""Steps of the V2 model runner, by its own seam for what a model needs beside the usual."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.startup.checks import OTHER_BACKEND
from vllm_sepllm.engine.worker.counts import Counts, computed_ids
from vllm_sepllm.engine.worker.metadata import KeptBuilder


class SepLLMModelState(DefaultModelState):
    """vLLM's state of a model, and the kept tokens of each request.

    Rows are the runner's own request indices. A request that resumes, or a session's next turn, is
    added anew with the ids of all tokens it has, and the scheduler knows those of what is computed
    of it; ids generated since are on the device alone, as the model's input. A subclass counts on
    one kind of hardware.
    """

    # Whether batches of vLLM's own making have metadata, as those that graphs are captured from.
    has_unreal_metadata: ClassVar[bool]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._counts = self.make_counts()
        self._known: set[str] = set()

    @abstractmethod
    def make_counts(self) -> Counts:
        """Counts for as many requests as the runner has."""

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
        known = new_req_data.prefill_token_ids, new_req_data.num_computed_tokens
        self._counts.restart(req_index, computed_ids(new_req_data.req_id, *known))

    def remove_request(self, req_id: str) -> None:
        """Forget a request that ended or was preempted."""
        super().remove_request(req_id)
        self._known.discard(req_id)

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> Any:
        """Metadata of a batch, of which vLLM makes some itself, of requests it never added."""
        step = None
        if input_batch.req_ids[0] in self._known:
            step = self._counts.step(input_batch.idx_mapping, input_batch.input_ids)
        elif not self.has_unreal_metadata:
            return None
        return super().prepare_attn(
            input_batch, *args, **kwargs, model_specific_attn_metadata=BatchStep(step)
        )


class BatchStep(ModelSpecificAttnMetadata):
    """What one batch is, handed to the builders of all kept groups.

    Args:
        step: of :meth:`Counts.step`; ``None`` if vLLM made the batch up.
    """

    def __init__(self, step: Any) -> None:
        self._step = step

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        """Arguments of ``build``."""
        is_kept = isinstance(attn_metadata_builder, KeptBuilder)
        return {"step": self._step} if is_kept else {}
