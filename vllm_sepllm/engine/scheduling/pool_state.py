"""What the managers of all groups know together about one block pool."""

from __future__ import annotations

from vllm.v1.core.block_pool import BlockPool

from vllm_sepllm.engine.scheduling.eviction import Junctions, SparePages
from vllm_sepllm.engine.scheduling.prefix_index import PrefixIndex
from vllm_sepllm.engine.scheduling.tally import Tally

_KEPT_AS = "_state_of_sepllm"


class PoolState:
    """An attribute of a block pool of vLLM's, which gives managers no other place to meet.

    Attributes:
        prefixes: kept tokens of known prefixes.
        spare: pages to evict first.
        junctions: points to evict last.
        tails: of each live request the token blocks before its prompt's end that the next request
            is likely to need, which may be none; noted by the window group that comes first.
        tally: what is counted for the metrics.
    """

    def __init__(self, block_pool: BlockPool) -> None:
        self.prefixes = PrefixIndex(block_pool.num_gpu_blocks)
        self.spare = SparePages(block_pool)
        self.junctions = Junctions(block_pool.num_gpu_blocks)
        self.tails: dict[str, range] = {}
        self.tally = Tally()

    @staticmethod
    def of(block_pool: BlockPool) -> PoolState:
        """The one state of a block pool; it ends with it."""
        state: PoolState | None = getattr(block_pool, _KEPT_AS, None)
        if state is None:
            state = PoolState(block_pool)
            setattr(block_pool, _KEPT_AS, state)
        return state
