"""Changes to vLLM for which it has no seam.

Each says why it is needed, which symbol it changes and when it can go. It delegates to the
original, and adds nothing where a configuration does not select SEPLLM.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import wraps
from itertools import chain
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from vllm_sepllm.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

PATCHED = "_patched_by_sepllm"


def look_at_arguments() -> None:
    """Let ``max_model_len`` exceed a model's trained positions in cache positions, and refuse
    SEPLLM on a platform that would leave it out. Idempotent.

    Why: vLLM compares the two while it makes the model's configuration, before any plugin sees
    which attention is to run. Its own way out, ``VLLM_ALLOW_LONG_MAX_MODEL_LEN=1``, would lift the
    limit for every model of the process, and warn of what cannot happen here.

    And with ``VLLM_TARGET_DEVICE=cpu`` vLLM asks no plugin for the platform. Its own one for CPUs
    answers CPU_ATTN, full attention, whatever backend was asked for.

    Changes ``vllm.engine.arg_utils.EngineArgs.create_model_config``: with
    ``position_mode="cache"`` the length asked for is set after that comparison. What it may be is
    for ``checks`` to say.

    Not needed once vLLM lets an attention backend say how long its models may read, and its
    platform refuses backends that it does not run.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_sepllm.engine.startup import settings

    original: Callable[..., ModelConfig] = EngineArgs.create_model_config
    if getattr(original, PATCHED, False):
        return

    @wraps(original)
    def create_model_config(self: EngineArgs, *args: Any, **kwargs: Any) -> ModelConfig:
        asked: int | None = self.max_model_len
        is_ours = settings.is_asked_for(self)
        problem = platform_problem() if is_ours else None
        if problem is not None:
            raise ConfigError(f"SepLLM attention: {problem}")
        grows = is_ours and settings.asks_for_cache_positions(self)
        if asked is None or asked < 1 or not grows:
            return original(self, *args, **kwargs)
        self.max_model_len = None
        try:
            model_config = original(self, *args, **kwargs)
        finally:
            self.max_model_len = asked
        model_config.max_model_len = model_config.original_max_model_len = asked
        return model_config

    setattr(create_model_config, PATCHED, True)
    EngineArgs.create_model_config = create_model_config


def platform_problem() -> str | None:
    """Why this process would leave SEPLLM out without a word; ``None`` if it would not."""
    from vllm.platforms import current_platform

    kind: type = type(current_platform)
    if kind.__module__.startswith("vllm_sepllm.") or not current_platform.is_cpu():
        return None
    return (
        f"vLLM took {kind.__name__} for its platform without asking plugins, as it does with "
        "VLLM_TARGET_DEVICE=cpu: unset that variable"
    )


def tell_clients_why() -> None:
    """Let HTTP clients read why the scheduler ended their request. Idempotent.

    Why: the scheduler alone knows that a request does not fit, and says so in ``stop_reason``
    beside ``finish_reason="error"``. vLLM's server answers every such output with status 500
    and "Internal server error". ``Platform.validate_request`` comes too early: it sees neither
    the configuration nor tokens not generated yet, and the number of blocks a server knows is
    the sum over data-parallel replicas.

    Changes ``vllm.v1.engine.async_llm.AsyncLLM.generate``, which every server endpoint reads
    from: an output that ended with an error and a reason raises a ``VLLMValidationError``, which
    is status 400, or an error event in a stream, with the reason as its message.

    Not needed once vLLM's server passes on the ``stop_reason`` of an error
    (``GenerateBaseServing._raise_if_error``).
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM.generate
    if getattr(original, PATCHED, False):
        return

    @wraps(original)
    async def generate(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        # Closed when we raise, so that other samples of the request (n > 1) are aborted.
        async with aclosing(original(self, *args, **kwargs)) as outputs:
            async for output in outputs:
                for sample in output.outputs:
                    if sample.finish_reason == "error" and isinstance(sample.stop_reason, str):
                        raise VLLMValidationError(sample.stop_reason)
                yield output

    setattr(generate, PATCHED, True)
    AsyncLLM.generate = generate


def show_metrics() -> None:
    """Show SepLLM's metrics where vLLM shows its own. Idempotent.

    Why: vLLM loads plugins' loggers (``vllm.stat_logger_plugins``) for its server only, not for
    ``LLM``. Having one turns statistics on for every server, with or without SEPLLM, even with
    ``--disable-log-stats``. And loggers of plugins are made before vLLM's own, which removes all
    metrics named ``vllm:`` that it finds.

    Changes ``vllm.v1.metrics.loggers.StatLoggerManager.__init__``: for a configuration that selects
    SEPLLM, a logger of ours comes before the others.

    Not needed once vLLM loads plugins' loggers for every engine, and asks them whether they want
    to see its configuration.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    original: Callable[..., None] = StatLoggerManager.__init__
    if getattr(original, PATCHED, False):
        return

    @wraps(original)
    def init(self: StatLoggerManager, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger

        from vllm_sepllm.engine.metrics import SepLLMStatLogger
        from vllm_sepllm.engine.startup.settings import is_selected

        original(self, vllm_config, *args, **kwargs)
        if not is_selected(vllm_config):
            return
        if "vllm.v1.engine.async_llm" in sys.modules:  # and its configuration made elsewhere
            tell_clients_why()
        loggers = self.stat_loggers
        prometheus = next(each for each in loggers if isinstance(each, PrometheusStatLogger))
        single = [getattr(each, "per_engine_stat_loggers", {}).values() for each in loggers]
        writes_lines = any(
            isinstance(each, LoggingStatLogger) for each in (*loggers, *chain(*single))
        )
        ours = SepLLMStatLogger(vllm_config, self.engine_indexes, prometheus, writes_lines)
        loggers.insert(0, ours)

    setattr(init, PATCHED, True)
    StatLoggerManager.__init__ = init
