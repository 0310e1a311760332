"""What our workers add to vLLM's: layers checked, token ids for builders, both groups bound."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.scheduling.spec import window_specs
from vllm_sepllm.engine.startup.settings import Settings
from vllm_sepllm.engine.worker.adapters import check_adapters
from vllm_sepllm.engine.worker.backend import KEPT_SUFFIX, SepLLMImpl, is_dense, layer_index
from vllm_sepllm.engine.worker.counts import Counts
from vllm_sepllm.engine.worker.metadata import KeptBuilder
from vllm_sepllm.engine.worker.rotary import prepare_cache_positions
from vllm_sepllm.engine.worker.runner_steps import RunnerSteps

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker
else:
    Worker = object


class SepLLMWorker(Worker):
    """To be put before a worker class of vLLM's.

    A subclass says what counts.
    """

    @abstractmethod
    def replace_model_state(self) -> None:
        """Have the V2 runner's builders find token ids."""

    @abstractmethod
    def make_counts(self) -> Counts:
        """Counts for as many requests as the V1 runner has."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model; the V2 runner then keeps our state beside it.

        Raises:
            ConfigError: the model needs a state of its own, or its keys cannot be rotated to cache
                positions.
        """
        super().load_model(*args, **kwargs)
        settings = Settings.of(self.vllm_config)
        if self.lora_config is not None:
            num_layers = self.vllm_config.model_config.get_total_num_hidden_layers()
            check_adapters(self.model_runner.lora_manager, settings.asked_for, num_layers)
        if settings.config.position_mode == "cache":
            config = self.model_config
            with set_current_vllm_config(self.vllm_config):
                model = self.model_runner.get_model()
                prepare_cache_positions(model, config.get_hidden_size(), config.dtype)
        if self.use_v2_model_runner:
            self.replace_model_state()

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """vLLM's specs.

        Raises:
            ConfigError: no layer of the model uses SepLLM attention.
        """
        with set_current_vllm_config(self.vllm_config):  # read by SepLLMBackend.customize_spec
            specs = super().get_kv_cache_spec()
        self._check_dense_layers()
        whole_model = self.parallel_config.pipeline_parallel_size == 1
        if specs and whole_model and not window_specs(specs):
            raise ConfigError(
                f"no layer of {self.model_config.model} has full attention and is left out of "
                "dense_layers, so SepLLM attention has nothing to do: use another attention backend"
            )
        return specs

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """vLLM's. All pipeline stages must say the same, though one may have no layer of ours, so
        they say only what ours prefer."""
        names: list[str] = super().get_supported_kv_cache_layouts()
        ours = KVCacheLayout.LBHNC.name
        has_stages = self.parallel_config.pipeline_parallel_size > 1
        return [ours] if has_stages and ours in names else names

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's.

        Raises:
            ConfigError: captured graphs would go on with the scales of the first weights.
        """
        cache_dtype = self.cache_config.cache_dtype
        if cache_dtype.startswith("fp8") and not self.model_config.enforce_eager:
            raise ConfigError(
                f"reload_weights with kv_cache_dtype={cache_dtype!r}: captured graphs keep the "
                "scales of the first weights; start the engine anew, or with enforce_eager"
            )
        super().reload_weights(*args, **kwargs)

    def _check_dense_layers(self) -> None:
        """Layers asked to be dense would have been SepLLM's.

        Raises:
            ConfigError: one has a sliding window of its own.
        """
        layers = Settings.of(self.vllm_config).layers
        for name, layer in get_layers_from_vllm_config(self.vllm_config, Attention).items():
            if layer.sliding_window is not None and is_dense(layers, name):
                raise ConfigError(
                    f"dense_layers holds {layer_index(name)}, a layer with a sliding window of "
                    f"{layer.sliding_window} tokens of its own: leave it out"
                )

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV cache, and connect what needs it."""
        super().initialize_from_config(kv_cache_config)
        if not self.use_v2_model_runner:
            self._tell_builders()
        context = self.vllm_config.compilation_config.static_forward_context
        for name, layer in self.sepllm_layers().items():
            if context[name + KEPT_SUFFIX].kv_cache.data_ptr() != layer.kv_cache.data_ptr():
                raise RuntimeError(
                    f"vLLM placed the two KV-cache groups of {name} in different memory: "
                    "this model is not supported by SepLLM attention"
                )

    def _tell_builders(self) -> None:
        """Have the V1 runner's builders of kept groups find out about each step."""
        steps = RunnerSteps(self.make_counts(), self.model_runner)
        steps.follow()
        groups = [group for groups in self.model_runner.attn_groups for group in groups]
        for builder in [b for group in groups for b in group.metadata_builders]:
            if isinstance(builder, KeptBuilder):
                builder.steps = steps

    def sepllm_layers(self) -> dict[str, Attention]:
        """Attention layers of this rank that are not dense, by name."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        return {n: layer for n, layer in layers.items() if isinstance(layer.impl, SepLLMImpl)}
