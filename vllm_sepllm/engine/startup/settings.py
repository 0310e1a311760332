"""The options in a vLLM configuration, as resolved at start-up.

The process that builds the configuration looks the separators up in the tokenizer and writes
their ids back, as plain JSON, with the share of a text that memory is planned for: workers and the
scheduler then need neither a tokenizer nor a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_sepllm.carried import config_of, rule_in, rule_of, with_rule
from vllm_sepllm.config import PRESET, ConfigError, SepLLMConfig
from vllm_sepllm.engine.names import BACKEND_NAME
from vllm_sepllm.layers import LayerPlan
from vllm_sepllm.planning import Plan
from vllm_sepllm.policy import KeepRule

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

logger = init_logger(f"vllm.{__name__}")

OPTIONS_KEY = "sepllm"
SOURCE = "the model's config.json"  # of the rule that it was trained under
PLAN_KEY = "sepllm_plan"
RULE_STORED = "sepllm_rule"
NOTES_KEY = "sepllm_notes"


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether the SEPLLM backend serves any layer kind of this configuration."""
    attention = vllm_config.attention_config
    chosen = [attention.backend, *attention.backend_per_kind.values()]
    return any(backend is not None and backend.name == BACKEND_NAME for backend in chosen)


def warn_if_unused(vllm_config: VllmConfig) -> None:
    """Options for a backend that is not selected are most likely a forgotten argument, and so is
    the backend of a model that was trained under the rule."""
    if vllm_config.model_config is not None and carried_rule(vllm_config) is not None:
        logger.warning_once(
            "The model was trained under SepLLM attention (%s has the rule), which is not "
            "selected: full attention is used. Add --attention-backend sepllm.",
            SOURCE,
        )
    additional = vllm_config.additional_config
    if isinstance(additional, dict) and OPTIONS_KEY in additional:
        logger.warning_once(
            "additional_config has options for SepLLM attention, which is not selected: "
            "full attention is used. Add --attention-backend sepllm."
        )


@dataclass(frozen=True, eq=False)
class Settings:
    """What a configuration says of SepLLM, parsed once per process.

    Attributes:
        config: the options; with separator ids once start-up has resolved them.
        vocab_size: of the model.
        stored: what :func:`store` wrote beside the options, empty before.
    """

    config: SepLLMConfig
    vocab_size: int
    stored: dict[str, Any]

    @staticmethod
    def of(vllm_config: VllmConfig) -> Settings:
        """The settings of a configuration.

        Raises:
            ConfigError: options are malformed.
        """
        global _last
        additional = vllm_config.additional_config
        vocab_size = vllm_config.model_config.get_vocab_size()
        carried = carried_rule(vllm_config)
        if _last is None or _last[0] != (additional, vocab_size, carried):
            stored = {}
            if isinstance(additional, dict):
                keys = PLAN_KEY, NOTES_KEY, RULE_STORED
                stored = {key: additional[key] for key in keys if key in additional}
            # Once resolved, all options are given, and the model's own are among them.
            config = _parse(additional, None if stored else carried)
            known = deepcopy((additional, vocab_size, carried))
            _last = known, Settings(config, vocab_size, stored)
        return _last[1]

    @property
    def is_resolved(self) -> bool:
        """Whether :func:`store` was called, here or in the process the configuration is from."""
        return PLAN_KEY in self.stored

    @cached_property
    def rule(self) -> KeepRule:
        """Which tokens are kept."""
        return KeepRule.of(self.config, self.vocab_size)

    @cached_property
    def layers(self) -> LayerPlan:
        """What each layer does, as resolved at start-up."""
        return LayerPlan(frozenset(self.config.dense_layers))

    @cached_property
    def plan(self) -> Plan:
        """What memory is planned for, as stored at start-up."""
        assert self.is_resolved, "options were not stored at start-up"
        return Plan.from_dict(self.stored[PLAN_KEY])

    @property
    def asked_for(self) -> SepLLMConfig:
        """The options before texts in them became ids, as far as a model is trained under them."""
        return config_of(self.stored[RULE_STORED], "start-up")

    @property
    def notes(self) -> list[str]:
        """What start-up warned of, one sentence each without its full stop."""
        return list(self.stored.get(NOTES_KEY, ()))


# The last configuration asked about, as it was, and what it says: a process serves one.
_last: tuple[tuple[Any, int, Any], Settings] | None = None


def is_asked_for(engine_args: EngineArgs) -> bool:
    """Whether arguments select SEPLLM."""
    attention = engine_args.attention_config
    chosen = [engine_args.attention_backend, attention.backend]
    chosen += attention.backend_per_kind.values()
    return BACKEND_NAME in [getattr(backend, "name", str(backend)).upper() for backend in chosen]


def asks_for_cache_positions(engine_args: EngineArgs) -> bool:
    """Whether options say ``position_mode="cache"``; malformed ones do not."""
    additional = engine_args.additional_config
    given = additional.get(OPTIONS_KEY) if isinstance(additional, dict) else None
    # The rest may be wrong without the rule of the model, which is not known yet.
    decisive = {
        k: given[k] for k in (PRESET, "position_mode") if isinstance(given, dict) and k in given
    }
    try:
        return SepLLMConfig.from_dict(decisive).position_mode == "cache"
    except ConfigError:
        return False


def carried_rule(vllm_config: VllmConfig) -> Any:
    """The rule that the model was trained under, from its ``config.json``, or ``None``."""
    model: Any = vllm_config.model_config
    return rule_in(model.hf_config, model.hf_text_config)


def _parse(additional: Any, carried: Any = None) -> SepLLMConfig:
    given = additional.get(OPTIONS_KEY) if isinstance(additional, dict) else None
    return with_rule(given, carried, SOURCE)


def store(
    vllm_config: VllmConfig,
    options: SepLLMConfig,
    resolved: SepLLMConfig,
    plan: Plan,
    notes: Sequence[str],
) -> None:
    """Write resolved options back for the other processes.

    Args:
        vllm_config: changed.
        options: as they were asked for.
        resolved: options with separator ids.
        plan: what memory is planned for.
        notes: what start-up warns of, one sentence each without its full stop.
    """
    given = vllm_config.additional_config
    vllm_config.additional_config = {
        **(given if isinstance(given, dict) else {}),
        OPTIONS_KEY: resolved.to_dict(),
        RULE_STORED: rule_of(options),
        PLAN_KEY: plan.to_dict(),
        NOTES_KEY: list(notes),
    }
