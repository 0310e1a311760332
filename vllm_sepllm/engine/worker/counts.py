"""What the V1 and V2 runners ask of counts of kept tokens, on a CPU and on a GPU alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

TokenArray = npt.NDArray[np.int32]


class Counts(Protocol):
    """Counts of kept tokens, a row per request. They change in two ways and no other.

    A row is restarted when its request starts or resumes, from ids that are final on the host. A
    step's tokens are counted from the model's own input; that twice is as good as once.
    """

    def __len__(self) -> int:
        """Requests that there is room for."""

    def restart(self, row: int, token_ids: TokenArray) -> None:
        """Give a row to a request whose first ``[num_tokens]`` ids are computed already."""

    def step(self, index: torch.Tensor, token_ids: torch.Tensor) -> Any:
        """What builders of kept groups ask about a step.

        Args:
            index: ``[num_reqs]`` int, row of each request, where the rows are.
            token_ids: int32, of all requests one after the other, where the rows are.
        """


def computed_ids(req_id: str, token_ids: Sequence[int] | None, num_computed: int) -> TokenArray:
    """``[num_computed]`` ids of a request that starts or resumes, as the scheduler sends them."""
    known = 0 if token_ids is None else len(token_ids)
    assert known >= num_computed, f"{num_computed} tokens of {req_id} are computed, {known} known"
    return np.asarray((token_ids or ())[:num_computed], dtype=np.int32)
