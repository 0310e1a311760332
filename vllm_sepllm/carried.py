"""The rule that a model was trained under, as it travels with the model.

A model has it in its ``config.json``, under ``"sepllm"``; an adapter in ``sepllm.json`` beside its
weights. Transformers leaves no other trace of how a model attended while it was trained, so without
it a server could not notice a wrong window.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm_sepllm.config import PRESET, SepLLMConfig
from vllm_sepllm.keep_classes import SEPARATORS
from vllm_sepllm.option_checks import ConfigError
from vllm_sepllm.separator_lists import separator_texts

RULE_KEY = "sepllm"
RULE_FILE = "sepllm.json"
# Of a server, not of what a model was trained under.
_SERVING = frozenset(("position_mode", "prefill_kernel", "planned_kept_share", "planning_text"))
_ALWAYS = ("num_sink_tokens", "window_size")


def rule_of(config: SepLLMConfig) -> dict[str, Any]:
    """The options that a model is trained under: those that differ from the defaults, and always
    sinks and window, as plain JSON values."""
    given, default = config.to_dict(), SepLLMConfig().to_dict()
    return {
        name: value
        for name, value in given.items()
        if name not in _SERVING and (name in _ALWAYS or value != default[name])
    }


def rule_in(*configs: Any) -> Any:
    """The rule that a configuration of Transformers carries, of the model or of its text part: the
    first there is, or ``None``."""
    found = (getattr(config, RULE_KEY, None) for config in configs)
    return next((rule for rule in found if rule is not None), None)


def carried_by(model: str) -> Any:
    """The rule in the ``config.json`` of a folder, or of a name on the Hugging Face Hub; ``None``
    where there is none."""
    try:
        if Path(model).is_dir():
            found = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        else:
            from transformers import PretrainedConfig

            found, _ = PretrainedConfig.get_config_dict(model)
        return found.get(RULE_KEY) or (found.get("text_config") or {}).get(RULE_KEY)
    except Exception:  # what transformers raises differs; who loads the model says what is wrong
        return None


def config_of(rule: object, source: str) -> SepLLMConfig:
    """The options of a rule that travels with a model.

    Args:
        rule: as :func:`rule_of` gives it.
        source: where it was found, for people.

    Raises:
        ConfigError: it is none.
    """
    try:
        if not isinstance(rule, Mapping):
            raise ConfigError(f"{rule!r} is no mapping of options")
        return SepLLMConfig.from_dict({k: v for k, v in rule.items() if k not in _SERVING})
    except ConfigError as error:
        raise ConfigError(f"{source} carries a rule that cannot be read: {error}") from None


def with_rule(given: object, rule: object, source: str) -> SepLLMConfig:
    """Options for a model that may carry a rule: its own where none are given.

    Args:
        given: options by name, or ``None``. A preset is taken as it is.
        rule: ``None`` if it carries none; else, and ``source``, see :func:`config_of`.

    Raises:
        ConfigError: the rule cannot be read, or the options cannot be used, alone or beside it.
    """
    if rule is None:
        return SepLLMConfig.from_dict(given)
    carried = config_of(rule, source)
    if given is None:
        return carried
    if not isinstance(given, Mapping) or PRESET in given:
        return SepLLMConfig.from_dict(given)
    try:
        return SepLLMConfig.from_dict({**_beside(rule_of(carried), given), **given})
    except ConfigError as error:
        SepLLMConfig.from_dict(given)  # what is wrong without the rule is said without it
        raise ConfigError(f"{error} (what is not given here is as {source} carries it)") from None


def _beside(rule: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What of a rule stays where options are given: not what depends on, or stands for, those."""
    gone: set[str] = set()
    separators = {"separators", "separator_match", "separator_token_ids"}
    if separators & {*given}:
        gone |= separators
    if "keep" in given:
        gone |= {"keep_after", "segment_ends"}
        keep = given["keep"]  # checked later
        if isinstance(keep, (list, tuple)) and SEPARATORS not in keep:
            gone |= separators
    if given.get("policy", rule.get("policy", "sepllm")) != rule.get("policy", "sepllm"):
        gone |= {*rule} - {*_ALWAYS, "dense_layers"}
    return {name: value for name, value in rule.items() if name not in gone}


def differences(config: SepLLMConfig, carried: SepLLMConfig, num_layers: int) -> list[str]:
    """Where options differ from those that a model of ``num_layers`` layers was trained under, a
    clause each."""
    found = []
    for field in fields(SepLLMConfig):
        here, there = getattr(config, field.name), getattr(carried, field.name)
        is_other = _meant(field.name, here, num_layers) != _meant(field.name, there, num_layers)
        if field.name not in _SERVING and is_other:
            found.append(f"{field.name} is {_shown(here)} here and was {_shown(there)}")
    return found


def read_rule(folder: str | Path) -> SepLLMConfig | None:
    """The rule beside an adapter's weights; ``None`` if there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    path = Path(folder) / RULE_FILE
    try:
        rule = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} carries a rule that cannot be read: {error}") from None
    return config_of(rule, str(path))


def write_rule(folder: str | Path, config: SepLLMConfig) -> Path:
    """Put the rule beside an adapter's weights."""
    path = Path(folder) / RULE_FILE
    path.write_text(json.dumps(rule_of(config), indent=2) + "\n", encoding="utf-8")
    return path


def _meant(name: str, value: Any, num_layers: int) -> object:
    """Equal for values of an option that mean the same: texts and ids in any order, lists of
    separators as their texts, and layers counted from the first."""
    if name == "dense_layers":
        return {index + num_layers if index < 0 else index for index in value}
    if name == "separators":
        return {*separator_texts(value)}
    if name == "keep_after":
        return {(item, number) for number, items in value for item in items}
    return {*value} if isinstance(value, tuple) else value


def _shown(value: object) -> str:
    shown = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
    return shown if len(shown) <= 60 else f"{shown[:50]} ..."
