"""The options in a vLLM configuration, as resolved at start-up.

The process that builds the configuration looks the separators up in the tokenizer and writes
their ids back, as plain JSON, with the share of a text that memory is planned for: workers and the
scheduler then need neither a tokenizer nor a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.engine.registration import BACKEND_NAME
from vllm_sepllm.planning import Plan
from vllm_sepllm.policy import KeptPolicy

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger(f"vllm.{__name__}")

OPTIONS_KEY = "sepllm"
PLAN_KEY = "sepllm_plan"
NOTES_KEY = "sepllm_notes"


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether the SEPLLM backend serves any layer kind of this configuration."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *attention.backend_per_kind.values()]
    return any(backend is not None and backend.name == BACKEND_NAME for backend in chosen)


def warn_if_unused(vllm_config: VllmConfig) -> None:
    """Options for a backend that is not selected are most likely a forgotten argument."""
    additional = vllm_config.additional_config
    if isinstance(additional, dict) and OPTIONS_KEY in additional:
        logger.warning_once(
            "additional_config has options for SepLLM attention, which is not selected: "
            "full attention is used. Add --attention-backend sepllm."
        )


def options(vllm_config: VllmConfig) -> SepLLMConfig:
    """The options given in ``additional_config``.

    Raises:
        ConfigError: they are malformed.
    """
    return _parse(vllm_config.additional_config)


def asks_for_cache_positions(engine_args: EngineArgs) -> bool:
    """Whether arguments select SEPLLM with ``position_mode="cache"``; malformed ones do not."""
    attention = engine_args.attention_config
    chosen = [engine_args.attention_backend, attention.backend]
    chosen += attention.backend_per_kind.values()
    names = [getattr(backend, "name", str(backend)).upper() for backend in chosen]
    try:
        is_cache = _parse(engine_args.additional_config).position_mode == "cache"
    except ConfigError:
        return False
    return is_cache and BACKEND_NAME in names


def _parse(additional: Any) -> SepLLMConfig:
    given = additional.get(OPTIONS_KEY) if isinstance(additional, dict) else None
    return SepLLMConfig.from_dict(given)


def store(
    vllm_config: VllmConfig, resolved: SepLLMConfig, plan: Plan, notes: Sequence[str]
) -> None:
    """Write resolved options back for the other processes.

    Args:
        vllm_config: changed.
        resolved: options with separator ids.
        plan: what memory is planned for.
        notes: what start-up warns of, one sentence each without its full stop.
    """
    given = vllm_config.additional_config
    vllm_config.additional_config = {
        **(given if isinstance(given, dict) else {}),
        OPTIONS_KEY: resolved.to_dict(),
        PLAN_KEY: plan.to_dict(),
        NOTES_KEY: list(notes),
    }


def is_resolved(vllm_config: VllmConfig) -> bool:
    """Whether :func:`store` was called, here or in the process this configuration comes from."""
    additional = vllm_config.additional_config
    return isinstance(additional, dict) and PLAN_KEY in additional


def plan(vllm_config: VllmConfig) -> Plan:
    """What memory is planned for, as stored at start-up."""
    return Plan.from_dict(_stored(vllm_config, PLAN_KEY))


def notes(vllm_config: VllmConfig) -> list[str]:
    """What start-up warned of, one sentence each."""
    return list(_stored(vllm_config, NOTES_KEY))


def expected_kept_share(vllm_config: VllmConfig) -> float:
    """Kept tokens per token behind the window that memory is planned for, before the margin."""
    return plan(vllm_config).share


def _stored(vllm_config: VllmConfig, key: str) -> Any:
    additional = vllm_config.additional_config
    assert isinstance(additional, dict), "options were not stored at start-up"
    return additional[key]


def kept_policy(vllm_config: VllmConfig) -> KeptPolicy:
    """The policy of resolved options."""
    config = options(vllm_config)
    return KeptPolicy.from_config(config, vllm_config.model_config.get_vocab_size())
