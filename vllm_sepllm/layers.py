"""Which layers do what.

A layer is *kept*: a query sees sinks, kept tokens and a window, and the rest of its KV cache is
freed. Or it is *dense*: full attention. A method in which a layer does something else, such as
taking the keys of another, has its place here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from vllm_sepllm.config import ConfigError


class Layer(StrEnum):
    """What a layer does."""

    KEPT = "kept"
    DENSE = "dense"


@dataclass(frozen=True)
class LayerPlan:
    """What each layer of a model does.

    Attributes:
        dense: indices of dense layers, counted over all pipeline stages.
    """

    dense: frozenset[int] = frozenset()

    @staticmethod
    def of(indices: Iterable[int], num_layers: int) -> LayerPlan:
        """The plan of the option ``dense_layers``.

        Args:
            indices: of dense layers; negative ones count from the last.
            num_layers: of the model.

        Raises:
            ConfigError: a layer does not exist, or none is kept.
        """
        found = set()
        for index in indices:
            if not -num_layers <= index < num_layers:
                raise ConfigError(
                    f"dense_layers holds {index}: the model has {num_layers} layers, so indices "
                    f"go from {-num_layers} to {num_layers - 1}"
                )
            found.add(index % num_layers)
        if len(found) == num_layers:
            raise ConfigError(
                f"dense_layers names all {num_layers} layers, so SepLLM attention has nothing to "
                "do: leave some out, or use another attention backend"
            )
        return LayerPlan(frozenset(found))

    def __getitem__(self, index: int) -> Layer:
        return Layer.DENSE if index in self.dense else Layer.KEPT

    @property
    def indices(self) -> tuple[int, ...]:
        """Dense layers as the option has them, all counted from the first."""
        return tuple(sorted(self.dense))
