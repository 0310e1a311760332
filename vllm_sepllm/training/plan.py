"""What each token of a batch of texts sees, from token ids and the rule that serving has too.

A batch is ``[rows, tokens]``. Padding is left out, wherever it stands, and a row can hold several
texts one behind the other ("packing"). So a batch is a list of texts, and the tokens of all of them
are one long row, in which no text sees anything of another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from sepllm_kernels.sequence.packed import PackedPlan

from vllm_sepllm.policy import KeepRule
from vllm_sepllm.spans import BoolArray

IdArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class TextPlan:
    """What each token of one text sees: :class:`PackedPlan`, with places counted from the text's
    first token, in numpy.

    Attributes:
        kept: ``[num_kept]`` places.
        window_first: ``[num_tokens]``.
        stream: ``[2, num_tokens]``.
        sinks: the same; both ends are 0 where the sinks are part of the stream.
    """

    kept: IdArray
    window_first: IdArray
    stream: IdArray
    sinks: IdArray

    @staticmethod
    def of(token_ids: npt.ArrayLike, rule: KeepRule) -> TextPlan:
        """A text under the rule (:mod:`vllm_sepllm.policy`)."""
        flags = rule.kept_flags(token_ids)
        prefix = np.zeros(flags.size + 1, dtype=np.int32)
        np.cumsum(flags, out=prefix[1:])
        place = np.arange(flags.size)
        limit = rule.stream_limit(prefix, place)
        first = rule.seen.first_entries(limit)
        sinks = np.zeros((2, flags.size), dtype=np.int64)
        if rule.max_separator_tokens is not None:
            sinks[1] = np.minimum(limit, rule.num_sink_tokens)
        stream = np.stack([first, limit]).astype(np.int64)
        return TextPlan(np.flatnonzero(flags), rule.window_start(place), stream, sinks)

    @staticmethod
    def causal(num_tokens: int, window_size: int | None = None) -> TextPlan:
        """All earlier tokens, or those of a sliding window; the own one counts."""
        size = num_tokens if window_size is None else window_size
        first = np.maximum(np.arange(num_tokens) - size + 1, 0)
        none = np.zeros((2, num_tokens), dtype=np.int64)
        return TextPlan(np.zeros(0, dtype=np.int64), first, none, none)


class Pattern(Protocol):
    """What the kept layers of a model see, which may differ from head to head."""

    def heads(self, num_kv_heads: int) -> tuple[slice, ...]:
        """KV heads that see alike.

        Raises:
            ValueError: they cannot be shared out.
        """

    def text_plans(self, token_ids: IdArray) -> tuple[TextPlan, ...]:
        """What each token of a text sees, for each of these."""


@dataclass(frozen=True, eq=False)
class KeptPattern:
    """All heads under one rule.

    Attributes:
        rule: which tokens are kept.
    """

    rule: KeepRule

    def heads(self, num_kv_heads: int) -> tuple[slice, ...]:
        """All."""
        return (slice(num_kv_heads),)

    def text_plans(self, token_ids: IdArray) -> tuple[TextPlan, ...]:
        """One plan."""
        return (TextPlan.of(token_ids, self.rule),)


def pack(texts: Iterable[TextPlan], device: torch.device | str = "cpu") -> PackedPlan:
    """Texts one behind the other."""
    num_tokens = num_kept = 0
    parts: list[tuple[IdArray, ...]] = []
    has_sinks = False
    for text in texts:
        in_text = text.kept + num_tokens, text.window_first + num_tokens
        parts.append((*in_text, text.stream + num_kept, text.sinks + num_kept))
        has_sinks = has_sinks or bool(text.sinks.any())
        num_tokens += text.window_first.size
        num_kept += text.kept.size
    kept, window_first, stream, sinks = (
        np.concatenate([part[index] for part in parts], axis=-1) for index in range(4)
    )

    def moved(array: IdArray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(dtype=dtype).to(device, non_blocking=True)

    return PackedPlan(
        moved(kept, torch.int64),
        moved(window_first, torch.int32),
        moved(stream, torch.int32),
        moved(sinks, torch.int32) if has_sinks else None,
    )


def _cuts(positions: IdArray, num_cached: int) -> IdArray:
    """Where another text begins in a row of tokens."""
    cuts: IdArray = np.flatnonzero(np.diff(positions) <= 0) + 1
    for cut in cuts[(cuts >= num_cached) & (positions[cuts] != 0)] if num_cached else ():
        raise ValueError(
            f"position_ids go on from {positions[cut - 1]} in the cache to {positions[cut]}: they "
            "rise within a text, and another one begins at 0; where padding stands on the left, "
            "give position_ids that do not count it to every call, "
            "(attention_mask.cumsum(1) - 1).clamp(min=0)"
        )
    return cuts


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of a batch.

    Attributes:
        token_ids: of each text.
        is_token: ``[rows, tokens]`` bool, false for padding.
    """

    token_ids: tuple[IdArray, ...]
    is_token: BoolArray

    @staticmethod
    def of(
        input_ids: torch.Tensor,
        is_token: BoolArray | None = None,
        positions: torch.Tensor | None = None,
        num_cached: int = 0,
    ) -> Texts:
        """Cut a batch into texts.

        Args:
            input_ids: ``[rows, tokens]``.
            is_token: the same, false for padding; ``None`` is none.
            positions: the same: where they do not rise from one token to the next, another text
                begins. ``None`` is one text in each row.
            num_cached: tokens of a row that are in a cache.

        Raises:
            ValueError: a row is nothing but padding, or positions fall behind the cached ones to
                another one than 0.
        """
        ids = input_ids.cpu().numpy()
        is_token = np.ones(ids.shape, dtype=np.bool_) if is_token is None else is_token
        places = None if positions is None else positions.cpu().numpy()
        found: list[IdArray] = []
        for row, row_ids in enumerate(ids):
            of_row = row_ids[is_token[row]]
            if not of_row.size:
                raise ValueError(f"row {row} of the batch is nothing but padding: leave it out")
            cuts: IdArray = np.zeros(0, dtype=np.int64)
            if places is not None:
                cuts = _cuts(places[row][is_token[row]], int(is_token[row, :num_cached].sum()))
            found.extend(np.split(of_row, cuts))
        return Texts(tuple(found), is_token)

    @property
    def has_padding(self) -> bool:
        """Whether there is a place without a token."""
        return not bool(self.is_token.all())

    @property
    def is_plain(self) -> bool:
        """Whether each row is one text, without padding."""
        return len(self.token_ids) == len(self.is_token) and not self.has_padding
