"""The share of a text that stays and the pages it takes, planned before any text has come.

How much separators keep depends on the text. Unless a share or a text is given, it is the largest
that they keep in any of ``SAMPLES``, so that no script among them gets less memory than it needs.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_sepllm.config import ConfigError, SepLLMConfig
from vllm_sepllm.policy import KeepRule, SeenStream
from vllm_sepllm.samples import SAMPLES
from vllm_sepllm.separator_lists import DEFAULT_SEPARATORS, LIST_OF_SAMPLE, SEPARATOR_LISTS
from vllm_sepllm.token_texts import Tokenizer, token_texts

# Four PG19 books under two tokenizers keep 1.03 to 1.20 times the share of a sample of their kind.
PLANNING_MARGIN = 1.25
# Where no tokenizer is at hand to estimate the share: above all English text measured.
UNKNOWN_KEPT_SHARE = 0.25
# The same with tokens kept behind others (the preset "facts" keeps 64 % of school problems).
UNKNOWN_KEPT_SHARE_OF_SPANS = 0.65
LARGEST_TEXT = 1 << 20  # bytes of ``planning_text`` that are looked at
FEWEST_TOKENS = 100  # of ``planning_text``
NEXT_TO_NOTHING = 0.02  # newlines between paragraphs alone are about one in a hundred tokens


@dataclass(frozen=True)
class Plan:
    """What memory is planned for. Plain values, so that it can be stored as JSON.

    Attributes:
        share: kept tokens per token behind the window.
        source: what it comes from, for people.
        margin: memory planned is this times ``share``.
        most_kept: the sample text that keeps the largest share, "" if none was looked at.
        largest_share: of that sample.
        scarce: sample texts of which next to nothing is kept.
        helpful: what the option ``separators`` would have to be for them; none if nothing helps.
    """

    share: float
    source: str
    margin: float = PLANNING_MARGIN
    most_kept: str = ""
    largest_share: float = 0.0
    scarce: tuple[str, ...] = ()
    helpful: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        """The plan that :meth:`to_dict` was called on."""
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**given)

    def with_help(
        self, separators: tuple[str, ...], tokenizer: Tokenizer | None, found: tuple[str, ...]
    ) -> Plan:
        """The same with the separators that would help; see :func:`lists_for`."""
        lists = lists_for(self.scarce, tokenizer, found)
        own = ("default",) if separators == DEFAULT_SEPARATORS else separators
        return replace(self, helpful=(*own, *lists) if lists else ())

    @property
    def planned_share(self) -> float:
        """``share`` with its margin."""
        return min(1.0, self.share * self.margin)

    @property
    def covers_samples(self) -> bool:
        """Whether every sample text keeps at most what is planned."""
        return self.planned_share >= self.largest_share


def expected_kept_pages(
    planned_share: float,
    seen: SeenStream,
    window_size: int,
    page_size: int,
    num_tokens: int,
    num_in_flight: int,
) -> int:
    """Pages of kept tokens planned for one request.

    Args:
        planned_share: see :class:`Plan`.
        seen: which of them a query sees.
        window_size: ``n``, tokens.
        page_size: entries of a page.
        num_tokens: of the request.
        num_in_flight: tokens of it that steps in flight compute at most.
    """
    sinks, bound = seen.num_sink_tokens, seen.max_separator_tokens
    kept = math.ceil(min(num_tokens, sinks + planned_share * num_tokens))
    pages = -(-kept // page_size)
    if bound is None:
        return pages
    recent = math.ceil(planned_share * (window_size - 1 + num_in_flight))
    # Their first entry may lie anywhere in its page.
    bounded = -(-(bound + recent) // page_size) + 1
    return min(pages, seen.num_sink_pages(page_size) + bounded)


def make_plan(options: SepLLMConfig, rule: KeepRule, tokenizer: Tokenizer | None) -> Plan:
    """The plan of resolved options.

    Args:
        options: resolved.
        rule: of these options.
        tokenizer: ``None`` if there is none.

    Raises:
        ConfigError: ``planning_text`` cannot be used.
    """
    text = None if options.planning_text is None else read_planning_text(options.planning_text)
    known = _known_plan(options)
    if known is not None and text is None and options.planned_kept_share is None:
        return known
    shares = sample_shares(rule, tokenizer)
    plan = _first_plan(options, rule, tokenizer, shares, text)
    if not shares:
        return plan
    most = max(shares, key=lambda name: shares[name])
    scarce = tuple(name for name, share in shares.items() if share < NEXT_TO_NOTHING)
    return replace(plan, most_kept=most, largest_share=shares[most], scarce=scarce)


def _known_plan(options: SepLLMConfig) -> Plan | None:
    """The plan where the share does not depend on the text."""
    share = options.method.share
    if share is not None:
        option = "interval" if options.method.uses_interval else "policy"
        return Plan(share(options), f"{option}={getattr(options, option)!r}", margin=1.0)
    if options.keeps_nothing:
        return Plan(0.0, "keep=[]", margin=1.0)
    return None


def _first_plan(
    options: SepLLMConfig,
    rule: KeepRule,
    tokenizer: Tokenizer | None,
    shares: dict[str, float],
    text: str | None,
) -> Plan:
    """The plan of the first source there is: a share, a text, the samples, nothing."""
    if options.planned_kept_share is not None:
        return Plan(options.planned_kept_share, "planned_kept_share", margin=1.0)
    if text is not None:
        return Plan(_share_of_text(options, rule, tokenizer, text), "planning_text")
    if shares:
        share, name = max((share, name) for name, share in shares.items())
        return Plan(share, f"sample text: {name}")
    why = "without a tokenizer" if tokenizer is None else "the tokenizer cannot cut sample texts"
    guess = UNKNOWN_KEPT_SHARE if rule.spans is None else UNKNOWN_KEPT_SHARE_OF_SPANS
    return Plan(guess, f"a guess, {why}")


def _share_of_text(
    options: SepLLMConfig, rule: KeepRule, tokenizer: Tokenizer | None, text: str
) -> float:
    where = f"planning_text={options.planning_text!r}"
    if tokenizer is None:
        raise ConfigError(
            f"{where} without a tokenizer to cut it with (skip_tokenizer_init): "
            "set planned_kept_share instead"
        )
    try:
        ids = tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:
        raise ConfigError(
            f"{where} cannot be cut into tokens ({type(error).__name__}: {_first_line(error)}): "
            "set planned_kept_share instead"
        ) from error
    if len(ids) < FEWEST_TOKENS:
        raise ConfigError(
            f"{where} has {len(ids)} tokens: must have at least {FEWEST_TOKENS} to tell a share; "
            "give a longer text, or planned_kept_share"
        )
    return kept_share(rule, ids)


def kept_share(rule: KeepRule, token_ids: list[int]) -> float:
    """Share of tokens kept, sinks left out; ``token_ids`` has at least one."""
    return float(rule.kept_flags(token_ids, first_position=rule.num_sink_tokens).mean())


def sample_shares(rule: KeepRule, tokenizer: Tokenizer | None) -> dict[str, float]:
    """Share kept of every sample text that the tokenizer can cut, by its name."""
    shares = {}
    for name, text in SAMPLES.items() if tokenizer is not None else ():
        try:
            ids = tokenizer.encode(text, add_special_tokens=False)  # type: ignore[union-attr]
            if ids:
                shares[name] = kept_share(rule, ids)
        except Exception:  # an estimate never ends a start
            continue
    return shares


def lists_for(
    scarce: tuple[str, ...], tokenizer: Tokenizer | None, found: tuple[str, ...]
) -> tuple[str, ...]:
    """Names of the separator lists that would add separators for these samples.

    Args:
        scarce: names of samples.
        tokenizer: has tokens that a list is of use for, or not.
        found: texts of the separators there are.
    """
    if tokenizer is None or not scarce:
        return ()
    try:
        texts = set(token_texts(tokenizer)).difference(found)
    except Exception:  # an estimate never ends a start
        return ()
    names = dict.fromkeys(LIST_OF_SAMPLE[name] for name in scarce)
    return tuple(name for name in names if not texts.isdisjoint(SEPARATOR_LISTS[name]))


def read_planning_text(path: str) -> str:
    """The first ``LARGEST_TEXT`` bytes of a file as text.

    Raises:
        ConfigError: it is no file, cannot be read, is empty or is not UTF-8.
    """
    where = f"planning_text={path!r}"
    try:
        with open(os.path.expanduser(path), "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"{where} is no file: give the path of a UTF-8 text file")
            data = file.read(LARGEST_TEXT)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise ConfigError(
            f"{where} cannot be read ({reason}): give the path of a UTF-8 text file"
        ) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(data) < LARGEST_TEXT or error.start < len(data) - 3:  # not cut in a character
            raise ConfigError(
                f"{where} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv"
            ) from error
        text = data[: error.start].decode("utf-8")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise ConfigError(f"{where} is empty: give a text like those to be served")
    return text


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
