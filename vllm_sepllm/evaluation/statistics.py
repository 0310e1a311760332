"""Whether two ways differ by more than chance, on the same tokens and the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 64  # tokens: neighbours are not independent of each other
LIKELY = 0.05  # chance below which a difference is taken for one


@dataclass(frozen=True)
class Difference:
    """Of two ways in nats per token.

    Attributes:
        mean: above 0 where the first way predicts worse.
        error: standard error of it.
        blocks: of tokens, whose means the error is from.
    """

    mean: float
    error: float
    blocks: int

    @property
    def chance(self) -> float:
        """That ways which predict as well differ so much or more (Student's t, two-sided)."""
        if self.mean == 0 or math.isinf(self.error):
            return 1.0
        return 1 - _t_within(abs(self.mean) / self.error, self.blocks - 1) if self.error else 0.0

    @property
    def is_clear(self) -> bool:
        """More than chance."""
        return self.chance < LIKELY


def _t_within(t: float, freedom: int) -> float:
    """Probability that Student's t is between ``-t`` and ``t`` (Abramowitz and Stegun, 26.7.3 and
    26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    is_odd = freedom % 2
    term = math.cos(angle) if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(1 + is_odd, freedom - 2, 2):
        term *= math.cos(angle) ** 2 * k / (k + 1)
        total += term
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if is_odd else total


def nats_difference(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]
) -> Difference:
    """Of the tokens of several texts. The error is that of means of blocks of ``BLOCK`` tokens.

    Args:
        first: negative log-likelihoods, a list for each text.
        second: of the same tokens.
    """
    by_text = [
        [a - b for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)
    ]
    found = [delta for text in by_text for delta in text]
    blocks = [
        sum(text[at : at + BLOCK]) / BLOCK
        for text in by_text
        for at in range(0, len(text) - BLOCK + 1, BLOCK)
    ]
    mean = sum(found) / len(found)
    if len(blocks) < 2:
        return Difference(mean, math.inf, len(blocks))
    middle = sum(blocks) / len(blocks)
    spread = sum((block - middle) ** 2 for block in blocks) / (len(blocks) - 1)
    return Difference(mean, math.sqrt(spread / len(blocks)), len(blocks))


@dataclass(frozen=True)
class Pairs:
    """Questions that one of two ways answers rightly and the other does not.

    Attributes:
        first: that only the first way answers.
        second: that only the second way answers.
    """

    first: int
    second: int

    @staticmethod
    def of(first: Sequence[bool], second: Sequence[bool]) -> Pairs:
        """From whether each of the same questions was answered rightly."""
        both = list(zip(first, second, strict=True))
        return Pairs(sum(a and not b for a, b in both), sum(b and not a for a, b in both))

    @property
    def chance(self) -> float:
        """That ways which are as good differ so much or more (exact sign test, two-sided)."""
        total, least = self.first + self.second, min(self.first, self.second)
        tail = sum(math.comb(total, k) for k in range(least + 1))
        return min(1.0, 2 * tail / int(2**total))

    @property
    def is_clear(self) -> bool:
        """More than chance."""
        return self.chance < LIKELY
