"""Options of SepLLM attention: ``additional_config["sepllm"]``, parsed once into one object.

Names used elsewhere and in papers:

======================== ========================================================
here                     elsewhere
======================== ========================================================
``num_sink_tokens``      SepLLM "initial tokens" (a), SepCache ``init_cache_size``,
                         StreamingLLM ``start_size``, kvpress ``n_sink``
``window_size``          SepLLM "neighboring tokens" (n), own token included; SepCache
                         ``local_size``, StreamingLLM ``recent_size``; SinkCache
                         ``window_length`` counts the sinks too
``max_separator_tokens`` SepLLM streaming "separator cache" (s), ``sep_cache_size``
``separator_token_ids``  SepCache ``separator_token_ids``
``keep``, ``keep_after`` none: SepLLM keeps separators
``interval``             FixLLM's distance between kept tokens
none                     SepCache ``cache_size``, kvpress ``compression_ratio``, H2O
                         ``heavy_ratio``: see :mod:`vllm_sepllm.option_names`
======================== ========================================================

SepLLM: arXiv 2412.12094. StreamingLLM: arXiv 2309.17453.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

from vllm_sepllm import __version__
from vllm_sepllm.keep_classes import SEPARATORS
from vllm_sepllm.option_checks import (
    MAX_TOKENS,
    ConfigError,
    check_choice,
    check_count,
    checked_keep,
    checked_keep_after,
    checked_layers,
    checked_segment_ends,
    checked_texts,
    checked_token_ids,
    only_ids,
    plain,
)
from vllm_sepllm.option_names import hint
from vllm_sepllm.policy import POLICIES, Policy
from vllm_sepllm.presets import PRESETS
from vllm_sepllm.separator_lists import DEFAULT_SEGMENT_ENDS, DEFAULT_SEPARATORS

__all__ = ["MAX_TOKENS", "PRESET", "ConfigError", "SepLLMConfig"]

SEPARATOR_MATCHES = ("exact", "composed")
POSITION_MODES = ("original", "cache")
PREFILL_KERNELS = ("triton", "xformers")
PRESET = "preset"  # stands for options, and is none itself


@dataclass(frozen=True)
class SepLLMConfig:
    """Validated options. All sizes are counts of tokens, never ratios.

    Attributes:
        policy: which tokens outside the window are kept, a name in ``POLICIES``.
        keep: tokens that stay behind the window: names of ``KEEP_CLASSES``, texts of single
            tokens, and token ids. None of them leaves sinks and window.
        keep_after: tokens that a kept token keeps behind itself, up to the end of its segment (see
            :mod:`vllm_sepllm.spans`): one number for all items of ``keep``, or a mapping of items
            to numbers, or pairs of a number and its items, which is what becomes of both.
        segment_ends: texts and ids of tokens that end a segment. A token ends one if its text is
            one of them, or has one of them in it and neither letters nor digits.
        num_sink_tokens: first tokens of a request, always kept.
        window_size: most recent tokens attended densely, the query's own included.
        max_separator_tokens: newest tokens of ``keep`` kept per request; ``None`` keeps all.
        separators: texts that make a token a separator, and names of lists of them; see
            ``SEPARATOR_LISTS``. A name means the list, never the text of that word.
        separator_match: ``"exact"``: the token is one of ``separators``;
            ``"composed"``: the token consists of nothing but characters of ``separators``,
            those of texts with letters or digits left out.
        separator_token_ids: ids of the separators, which override the two fields above.
        interval: distance between kept tokens of ``policy="fixed_interval"``.
        position_mode: positions that rotary embeddings see: those of the text, or with
            ``"cache"`` the places of what a query sees, numbered from 0.
        dense_layers: layers with full attention, by index; negative ones count from the last.
        prefill_kernel: what computes prompts on a GPU.
        planned_kept_share: share of a text's tokens that memory is planned for; ``None``
            estimates it.
        planning_text: file of UTF-8 text to estimate it from.

    Raises:
        ConfigError: a value is out of range or contradicts another.
    """

    policy: str = "sepllm"
    keep: tuple[str | int, ...] = (SEPARATORS,)
    keep_after: tuple[tuple[int, tuple[str | int, ...]], ...] = ()
    segment_ends: tuple[str | int, ...] = DEFAULT_SEGMENT_ENDS
    num_sink_tokens: int = 4
    window_size: int = 256
    max_separator_tokens: int | None = None
    separators: tuple[str, ...] = DEFAULT_SEPARATORS
    separator_match: str = "exact"
    separator_token_ids: tuple[int, ...] | None = None
    interval: int | None = None
    position_mode: str = "original"
    dense_layers: tuple[int, ...] = ()
    prefill_kernel: str = "triton"
    planned_kept_share: float | None = None
    planning_text: str | None = None

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, tuple(POLICIES))
        check_choice("separator_match", self.separator_match, SEPARATOR_MATCHES)
        check_choice("position_mode", self.position_mode, POSITION_MODES)
        check_choice("prefill_kernel", self.prefill_kernel, PREFILL_KERNELS)
        check_count("num_sink_tokens", self.num_sink_tokens, 0, "4 is the paper's setting")
        check_count("window_size", self.window_size, 1, "256 is the paper's setting")
        if self.max_separator_tokens is not None:
            check_count("max_separator_tokens", self.max_separator_tokens, 1, "null keeps all")
        if self.interval is not None:
            check_count("interval", self.interval, 1, "5 is FixLLM's setting")
        object.__setattr__(self, "keep", checked_keep("keep", self.keep))
        is_given = self.keep_after != ()
        object.__setattr__(self, "keep_after", checked_keep_after(self.keep_after, self.keep))
        ends = checked_segment_ends(self.segment_ends)
        if is_given and not self.keep_after:  # 0 tokens: there is nothing to end
            ends = DEFAULT_SEGMENT_ENDS
        object.__setattr__(self, "segment_ends", ends)
        object.__setattr__(self, "separators", checked_texts("separators", self.separators))
        if self.separator_token_ids is not None:
            ids = checked_token_ids("separator_token_ids", self.separator_token_ids)
            object.__setattr__(self, "separator_token_ids", ids)
        object.__setattr__(self, "dense_layers", checked_layers("dense_layers", self.dense_layers))
        self._check_planning()
        self._check_combinations()

    def _check_planning(self) -> None:
        share, text = self.planned_kept_share, self.planning_text
        if share is not None:
            is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not is_number or not 0 < share <= 1:
                raise ConfigError(
                    f"planned_kept_share={share!r}: must be a number above 0 and at most 1, e.g. "
                    "0.2; leave it out for an estimate"
                )
            object.__setattr__(self, "planned_kept_share", float(share))
        if text is not None and not (isinstance(text, str) and text.strip()):
            raise ConfigError(f"planning_text={text!r}: must be the path of a UTF-8 text file")
        if share is not None and text is not None:
            raise ConfigError(
                f"planned_kept_share={share} with planning_text={text!r}: both say what memory is "
                "planned for; drop one of the two"
            )

    def _check_combinations(self) -> None:
        if self.interval is not None and not self.method.uses_interval:
            raise ConfigError(
                f"interval={self.interval} with policy={self.policy!r}: only "
                "policy='fixed_interval' has an interval; drop one of the two"
            )
        if self.method.uses_interval and self.interval is None:
            raise ConfigError(
                f"policy={self.policy!r} without interval: set interval, e.g. interval=5"
            )
        if self.segment_ends != DEFAULT_SEGMENT_ENDS and not self.keep_after:
            raise ConfigError(
                f"segment_ends={list(self.segment_ends)!r} without keep_after: nothing is kept "
                "behind kept tokens, so there is nothing to end; set keep_after, e.g. keep_after=4"
            )
        separators: dict[str, object] = {
            "separators": self.separators if self.separators != DEFAULT_SEPARATORS else None,
            "separator_match": self.separator_match if self.separator_match != "exact" else None,
            "separator_token_ids": list(self.separator_token_ids or ()),
        }
        if self.method.uses_keep:
            if SEPARATORS not in self.keep:
                for name, value in separators.items():
                    if value:
                        raise ConfigError(
                            f"{name}={value!r} with keep={list(self.keep)!r}: 'separators' is not "
                            f"in keep; add it, or drop {name}"
                        )
            return
        given: dict[str, object] = {
            "keep": list(self.keep) if self.keep != (SEPARATORS,) else None,
            "keep_after": [[number, list(items)] for number, items in self.keep_after],
            "max_separator_tokens": self.max_separator_tokens,
            "separator_token_ids": separators["separator_token_ids"],
            "separators": separators["separators"],
            "planned_kept_share": self.planned_kept_share,
            "planning_text": self.planning_text,
        }
        for name, value in given.items():
            if value:
                raise ConfigError(
                    f"{name}={value!r} with policy={self.policy!r}: "
                    "only policy='sepllm' keeps tokens for what they are; drop one of the two"
                )

    @property
    def method(self) -> Policy:
        """The policy of this name."""
        return POLICIES[self.policy]

    @property
    def looks_up_separators(self) -> bool:
        """Whether separators are to be found in a tokenizer: they are wanted, and no ids given."""
        return self.uses_separators and self.separator_token_ids is None

    @property
    def uses_separators(self) -> bool:
        """Whether separators are among what is kept."""
        return self.method.uses_keep and SEPARATORS in self.keep

    @property
    def kept_ids(self) -> tuple[int, ...] | None:
        """Ids of the tokens that are kept, sorted; ``None`` if a tokenizer has to tell them."""
        if not self.method.uses_keep:
            return ()
        names = [item for item in self.keep if isinstance(item, str)]
        if self.looks_up_separators or any(name != SEPARATORS for name in names):
            return None
        listed = {item for item in self.keep if isinstance(item, int)}
        return tuple(sorted(listed.union(self.separator_token_ids or ())))

    @property
    def resolved_spans(self) -> tuple[tuple[tuple[int, tuple[int, ...]], ...], tuple[int, ...]]:
        """``keep_after`` and ``segment_ends`` as ids; none without ``keep_after``.

        Raises:
            ValueError: a tokenizer has to tell them.
        """
        if not self.keep_after:
            return (), ()
        pairs = tuple((number, only_ids(items)) for number, items in self.keep_after)
        return pairs, only_ids(self.segment_ends)

    @property
    def fingerprint(self) -> str:
        """Equal where the same tokens are kept by the same code."""
        return _fingerprint(self, __version__)

    @property
    def needs_tokenizer(self) -> bool:
        """Whether a tokenizer has to tell ids of tokens that are kept, or that end a segment."""
        ends = self.segment_ends if self.keep_after else ()
        return self.kept_ids is None or any(isinstance(item, str) for item in ends)

    @property
    def keeps_nothing(self) -> bool:
        """Whether sinks and window are all that a query sees."""
        share = self.method.share
        return self.kept_ids == () if share is None else share(self) == 0

    @classmethod
    def from_dict(cls, options: object) -> SepLLMConfig:
        """Parse ``additional_config["sepllm"]``.

        Args:
            options: a mapping of option names to plain JSON values, or ``None``. ``preset`` names
                one of ``PRESETS``, whose options are taken where none is given.

        Raises:
            ConfigError: not a mapping, an unknown key, or a bad value.
        """
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise ConfigError(
                f"additional_config['sepllm'] is {options!r}: expected a mapping of options, "
                'e.g. {"window_size": 256}'
            )
        known = [field.name for field in fields(cls)]
        for key in options:
            if key not in (*known, PRESET):
                raise ConfigError(f"unknown SepLLM option {key!r}: {hint(key, (*known, PRESET))}")
        given = dict(options)
        if PRESET in given:
            name = given.pop(PRESET)
            check_choice(PRESET, name, tuple(PRESETS))
            given = {**_preset_options(name, given), **given}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON values, so that vLLM can hash and pickle them."""
        return {key: plain(value) for key, value in asdict(self).items()}

    def with_kept_ids(
        self,
        token_ids: tuple[int, ...],
        keep_after: tuple[tuple[int, tuple[int, ...]], ...] = (),
        segment_ends: tuple[int, ...] = (),
    ) -> SepLLMConfig:
        """The same options with ids in the place of whatever names them.

        Args:
            token_ids: of ``keep``.
            keep_after, segment_ends: of the options of these names; ends are left out without
                ``keep_after``.
        """
        spans = tuple((number, ids) for number, ids in keep_after if ids)
        return replace(
            self,
            keep=token_ids,
            keep_after=spans,
            segment_ends=segment_ends if spans else DEFAULT_SEGMENT_ENDS,
            separators=DEFAULT_SEPARATORS,
            separator_match="exact",
            separator_token_ids=None,
        )

    def with_dense_layers(self, indices: tuple[int, ...]) -> SepLLMConfig:
        """The same options with ``dense_layers`` of a model, see :mod:`vllm_sepllm.layers`."""
        return replace(self, dense_layers=indices)


def _preset_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a preset beside those given: of its ``keep_after``, what they keep."""
    options = dict(PRESETS[name].options)
    after, keep = options.get("keep_after"), given.get("keep")
    if isinstance(after, Mapping) and isinstance(keep, (list, tuple)):
        options["keep_after"] = {item: number for item, number in after.items() if item in keep}
    return options


@lru_cache(maxsize=4)  # each layer asks, and with many kept ids it takes a while
def _fingerprint(config: SepLLMConfig, of_package: str) -> str:
    options = {**config.to_dict(), "planning_text": None}  # a path of one machine
    parts = json.dumps([of_package, options], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]
