"""What our platforms add to vLLM's.

The platform hook is where vLLM lets a plugin see a whole configuration before anything is
built from it. With any other backend every method is vLLM's own. vLLM asks for the platform in the
middle of its own imports, so what needs more of vLLM is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from vllm_sepllm.config import ConfigError
from vllm_sepllm.engine.names import ASYNC_SCHEDULER_PATH, SCHEDULER_PATH

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_sepllm.engine.startup.checks import Hardware

logger = init_logger(f"vllm.{__name__}")


def is_served(vllm_config: VllmConfig) -> bool:
    """Whether a configuration has a model and selects SepLLM; options without are warned of."""
    from vllm_sepllm.engine.startup import settings

    if vllm_config.model_config is not None and settings.is_selected(vllm_config):
        return True
    settings.warn_if_unused(vllm_config)
    return False


def complete(vllm_config: VllmConfig, hardware: Hardware, complete_own: Callable[[], None]) -> None:
    """Check and complete a configuration that selects SepLLM.

    Args:
        vllm_config: changed.
        hardware: it is to run on.
        complete_own: what vLLM's platform does with it.

    Raises:
        ConfigError: it cannot be served; the message says why and what to do.
    """
    from vllm_sepllm.engine.patches import show_metrics, tell_clients_why
    from vllm_sepllm.engine.startup.prepare import announce, prepare

    try:
        separators = prepare(vllm_config, hardware)
    except ConfigError as error:
        logger.error("%s", error)  # the exception is shown in the middle of a traceback
        raise
    vllm_config.parallel_config.worker_cls = hardware.worker_path
    complete_own()
    scheduler_config = vllm_config.scheduler_config
    scheduler_config.scheduler_cls = (
        ASYNC_SCHEDULER_PATH if scheduler_config.async_scheduling else SCHEDULER_PATH
    )
    if separators is not None:
        announce(vllm_config, separators)
        tell_clients_why()
        show_metrics()
