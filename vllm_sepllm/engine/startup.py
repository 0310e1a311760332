"""Start-up of an engine that uses SepLLM: check, resolve separators, say what was found."""

from __future__ import annotations

from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.engine import settings
from vllm_sepllm.engine.checks import Hardware, largest_cache, refusals, trained_length
from vllm_sepllm.engine.compat import caution, vllm_version
from vllm_sepllm.policy import KeptPolicy
from vllm_sepllm.separators import Separators, kept_share_of_english, resolve_separators

logger = init_logger(f"vllm.{__name__}")

# Planning figure where no tokenizer is at hand to estimate one: above all English text measured.
UNKNOWN_KEPT_SHARE = 0.25


def prepare(vllm_config: VllmConfig, hardware: Hardware) -> Separators | None:
    """Check a configuration and write its resolved options back into it.

    Args:
        vllm_config: changed.
        hardware: it is to run on.

    Returns:
        The separators found, or ``None`` if this was done before: vLLM completes the same
        configuration again in the engine's process.

    Raises:
        ConfigError: it cannot be served.
    """
    try:
        options = settings.options(vllm_config)
        problems = refusals(vllm_config, options, hardware)
        if problems:
            raise ConfigError("; ".join(problems))
        if settings.is_resolved(vllm_config):
            return None
        separators = _resolve(vllm_config, options)
    except ValueError as error:
        raise ConfigError(f"SepLLM attention: {error}") from None
    # vLLM's default of 0 keeps the window pages of a prompt's end only, so a prefix shared up to
    # any other point would be computed again. All of them stay found until memory is needed.
    if vllm_config.cache_config.prefix_cache_retention_interval == 0:
        vllm_config.cache_config.prefix_cache_retention_interval = None
    return separators


def _resolve(vllm_config: VllmConfig, options: SepLLMConfig) -> Separators:
    model_config = vllm_config.model_config
    vocab_size = model_config.get_vocab_size()
    tokenizer = None
    if not model_config.skip_tokenizer_init:
        tokenizer = cached_tokenizer_from_config(model_config)
        separators = resolve_separators(options, tokenizer)
        if options.separator_token_ids is None:
            # Tokens added to the tokenizer alone are never part of a prompt.
            separators = separators.below(vocab_size)
    elif options.separator_token_ids is not None or options.policy != "sepllm":
        ids = options.separator_token_ids or ()
        separators = Separators(ids, tuple(f"<id {i}>" for i in ids))
    else:
        raise ConfigError(
            "skip_tokenizer_init=True leaves no tokenizer to find separators in: "
            "set separator_token_ids"
        )
    resolved = options.with_separator_ids(separators.token_ids)
    if resolved.dense_layers:
        resolved = resolved.with_dense_layers_of(model_config.get_total_num_hidden_layers())
    policy = KeptPolicy.from_config(resolved, vocab_size)  # checks the ids
    share = kept_share_of_english(policy, tokenizer) if tokenizer else UNKNOWN_KEPT_SHARE
    settings.store(vllm_config, resolved, share)
    return separators


def announce(vllm_config: VllmConfig, separators: Separators) -> None:
    """The one INFO line, and a WARNING with a vLLM that was not run with all tests."""
    options = settings.options(vllm_config)
    found = vllm_version() or "unknown"
    shown = [repr(text) for text in separators.texts[:12]]
    if len(separators.texts) > len(shown):
        shown.append("...")
    bound = options.max_separator_tokens
    logger.info_once(
        "SepLLM attention: policy=%s, %d sinks, window of %d tokens, %d separator ids (%s), "
        "about %.0f%% of English prose kept behind the window%s, block size %d, vLLM %s%s",
        options.policy,
        options.num_sink_tokens,
        options.window_size,
        len(separators.token_ids),
        " ".join(shown),
        100 * settings.expected_kept_share(vllm_config),
        f" and at most {bound} separators" if bound is not None else "",
        vllm_config.cache_config.block_size,
        found,
        f", full attention in layers {list(options.dense_layers)}" if options.dense_layers else "",
    )
    if options.position_mode == "cache":
        _announce_length(
            vllm_config.model_config, options, settings.expected_kept_share(vllm_config)
        )
    warning = caution(found) if found != "unknown" else None
    if warning is not None:
        logger.warning_once("SepLLM attention is %s.", warning)


def _announce_length(model_config: ModelConfig, options: SepLLMConfig, share: float) -> None:
    """That texts may be longer than the model's positions, and when its cache still is not."""
    length, trained = model_config.max_model_len, trained_length(model_config)
    if length <= trained:
        return
    cache = largest_cache(options)
    if cache is not None:
        logger.info_once(
            "SepLLM attention: texts of up to %d tokens in %d of the model's %d positions",
            length,
            cache,
            trained,
        )
        return
    logger.warning_once(
        "SepLLM attention: texts of up to %d tokens, but what is kept of them fits into the "
        "model's %d positions only up to about %d tokens: set max_separator_tokens.",
        length,
        trained,
        max(0, trained - options.window_size) / share,
    )
