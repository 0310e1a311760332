"""Start-up of an engine that uses SepLLM: check, resolve separators, say what was found."""

from __future__ import annotations

import json
import math
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_sepllm.carried import config_of, differences
from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.engine.compat import caution, vllm_version
from vllm_sepllm.engine.startup.checks import Hardware, largest_cache, refusals, trained_length
from vllm_sepllm.engine.startup.settings import SOURCE, Settings, carried_rule, store
from vllm_sepllm.keep_classes import SEPARATORS
from vllm_sepllm.kept_ids import KeptIds, notes_of, resolve_kept
from vllm_sepllm.layers import LayerPlan
from vllm_sepllm.planning import NEXT_TO_NOTHING, Plan, make_plan
from vllm_sepllm.policy import KeepRule

logger = init_logger(f"vllm.{__name__}")


def prepare(vllm_config: VllmConfig, hardware: Hardware) -> KeptIds | None:
    """Check a configuration and write its resolved options back into it.

    Args:
        vllm_config: changed.
        hardware: it is to run on.

    Returns:
        The tokens to be kept, or ``None`` if this was done before: vLLM completes the same
        configuration again in the engine's process.

    Raises:
        ConfigError: it cannot be served.
    """
    try:
        settings = Settings.of(vllm_config)
        options = settings.config
        problems = refusals(vllm_config, options, hardware)
        if problems:
            raise ConfigError("; ".join(problems))
        if settings.is_resolved:
            return None
        found = _resolve(vllm_config, options)
    except ValueError as error:
        raise ConfigError(f"SepLLM attention: {error}") from None
    # vLLM's default of 0 keeps the window pages of a prompt's end only, so a prefix shared up to
    # any other point would be computed again. All of them stay found until memory is needed.
    if vllm_config.cache_config.prefix_cache_retention_interval == 0:
        vllm_config.cache_config.prefix_cache_retention_interval = None
    return found


def _resolve(vllm_config: VllmConfig, options: SepLLMConfig) -> KeptIds:
    model_config = vllm_config.model_config
    vocab_size = model_config.get_vocab_size()
    looks_up = options.needs_tokenizer
    tokenizer = _tokenizer(model_config, options, looks_up)
    found = resolve_kept(options, tokenizer)
    if looks_up:
        # Tokens added to the tokenizer alone are never part of a prompt.
        found = found.below(vocab_size)
        if not found.token_ids:
            raise ConfigError(
                f"all {_wanted(options)[0]} found have ids from the model's vocabulary size "
                f"{vocab_size} on, so no prompt has them: name others"
            )
    resolved = found.resolve(options)
    if resolved.dense_layers:
        layers = LayerPlan.of(resolved.dense_layers, model_config.get_total_num_hidden_layers())
        resolved = resolved.with_dense_layers(layers.indices)
    rule = KeepRule.of(resolved, vocab_size)  # checks the ids
    plan = make_plan(resolved, rule, tokenizer)
    if options.looks_up_separators:
        plan = plan.with_help(options.separators, tokenizer, found.separators.texts)
    notes = [*_contradictions(vllm_config, options), *_notes(options, found, plan)]
    store(vllm_config, options, resolved, plan, notes)
    return found


def _different_from_rule(vllm_config: VllmConfig, options: SepLLMConfig) -> list[str] | None:
    """See :func:`differences`; ``None`` if the model carries no rule."""
    rule = carried_rule(vllm_config)
    if rule is None:
        return None
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    return differences(options, config_of(rule, SOURCE), num_layers)


def _contradictions(vllm_config: VllmConfig, options: SepLLMConfig) -> list[str]:
    """Where options differ from the rule that the model was trained under: one sentence."""
    different = _different_from_rule(vllm_config, options)
    if not different:
        return []
    return [
        f"the model was trained under another rule ({SOURCE}): {'; '.join(different)}; leave these "
        "options out to serve it as it was trained"
    ]


def _tokenizer(model_config: ModelConfig, options: SepLLMConfig, looks_up: bool) -> Any:
    """The model's tokenizer; ``None`` where there is none and nothing has to be looked up."""
    what, remedy = _wanted(options)
    if model_config.skip_tokenizer_init:
        if looks_up:
            raise ConfigError(
                f"skip_tokenizer_init=True leaves no tokenizer to find {what} in: set {remedy}"
            )
        return None
    if not options.method.uses_keep:
        return None
    try:
        return cached_tokenizer_from_config(model_config)
    except Exception as error:  # what is raised differs by tokenizer and by file
        if not looks_up:
            return None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
        raise ConfigError(
            f"the tokenizer of {model_config.model} cannot be loaded ({reason}), so {what} cannot "
            f"be looked up: name another with --tokenizer, or set {remedy}"
        ) from error


def _wanted(options: SepLLMConfig) -> tuple[str, str]:
    """What is looked up, for people, and what to set where it cannot be."""
    if options.kept_ids is not None:
        return "segment ends", "segment_ends to token ids"
    if options.keep == (SEPARATORS,) and not options.keep_after:
        return "separators", "separator_token_ids"
    if options.keep_after:
        return "tokens of keep and segment_ends", "both to token ids"
    return "tokens of keep", "keep to token ids"


def _notes(options: SepLLMConfig, found: KeptIds, plan: Plan) -> list[str]:
    """What is worth a warning about what is kept, one sentence each without its full stop."""
    notes = notes_of(options, found)
    if plan.most_kept and not plan.largest_share and plan.source.startswith("sample"):
        notes.append(
            "no sample text has any of the separators, so memory is planned as if nothing were "
            "kept: set planned_kept_share or planning_text"
        )
    return notes


def announce(vllm_config: VllmConfig, found: KeptIds) -> None:
    """The one INFO line, and WARNINGs of what is kept and of a vLLM not run with all tests."""
    settings = Settings.of(vllm_config)
    options, plan = settings.config, settings.plan
    version = vllm_version() or "unknown"
    bound = options.max_separator_tokens
    is_as_trained = _different_from_rule(vllm_config, settings.asked_for) == []
    logger.info_once(
        "SepLLM attention: policy=%s, %d sinks, window of %d tokens, %s, "
        "memory planned for %.1f%% kept behind the window (%s)%s, block size %d, vLLM %s%s%s%s",
        options.policy,
        options.num_sink_tokens,
        options.window_size,
        _shown(found),
        100 * plan.share,
        plan.source if plan.margin == 1 else f"{plan.source}; planned_kept_share sets it",
        f" and at most {bound} separators" if bound is not None else "",
        vllm_config.cache_config.block_size,
        version,
        f", full attention in layers {list(options.dense_layers)}" if options.dense_layers else "",
        f", the rule is that of {SOURCE}" if is_as_trained else "",
        _scarce_clause(plan),
    )
    notes = settings.notes
    if notes:
        logger.warning_once("SepLLM attention: %s.", "; ".join(notes))
    if options.position_mode == "cache":
        _announce_length(vllm_config.model_config, options, plan.share)
    warning = caution(version) if version != "unknown" else None
    if warning is not None:
        logger.warning_once("SepLLM attention is %s.", warning)


def _shown(found: KeptIds) -> str:
    """How many ids of each class are kept; of separators some texts, and the default ones that are
    none."""
    separators = found.separators
    shown = [repr(text) for text in separators.texts[:12]]
    if len(separators.texts) > len(shown):
        shown.append("...")
    if separators.absent:
        shown.append(f"but not {' '.join(map(repr, separators.absent))}")
    parts = [
        f"{len(ids)} separator ids ({' '.join(shown)})"
        if name == SEPARATORS
        else f"{len(ids)} ids ({name})"
        for name, ids in found.by_class.items()
    ]
    parts += [f"{number} tokens behind {len(ids)} of them" for number, ids in found.keep_after]
    return ", ".join(parts) or "0 ids kept"


def _scarce_clause(plan: Plan) -> str:
    """Of which texts next to nothing is kept, and the separators that would keep more."""
    if not plan.scarce or not plan.largest_share:  # of which there is a warning
        return ""
    clause = f"; under {NEXT_TO_NOTHING:.0%} is kept of the sample texts {', '.join(plan.scarce)}"
    if not plan.helpful:
        return clause
    return f"{clause}: separators={json.dumps(plan.helpful, ensure_ascii=False)} keeps more"


def _announce_length(model_config: ModelConfig, options: SepLLMConfig, share: float) -> None:
    """That texts may be longer than the model's positions, and from where on their cache is."""
    length, trained = model_config.max_model_len, trained_length(model_config)
    if length <= trained:
        return
    seen_by_all = options.num_sink_tokens + options.window_size
    cache = largest_cache(options) or math.ceil(seen_by_all + share * (length - seen_by_all))
    if cache <= trained:
        logger.info_once(
            "SepLLM attention: texts of up to %d tokens in %s%d of the model's %d positions",
            length,
            "" if largest_cache(options) else "about ",
            cache,
            trained,
        )
        return
    remedy = "set max_separator_tokens"
    if options.method.uses_interval:
        remedy = "raise interval, lower max_model_len, or use policy='sepllm' with a bound"
    logger.warning_once(
        "SepLLM attention: texts of up to %d tokens are let in, but the model's %d positions hold "
        "what is kept of about %d tokens: %s.",
        length,
        trained,
        seen_by_all + (trained - seen_by_all) / share,
        remedy,
    )
