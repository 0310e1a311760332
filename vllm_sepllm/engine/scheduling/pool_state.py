"""What the managers of all groups know together about one block pool."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from vllm.v1.core.block_pool import BlockPool

from vllm_sepllm.engine.scheduling.eviction import Junctions, SparePages
from vllm_sepllm.engine.scheduling.prefix_index import PrefixIndex
from vllm_sepllm.engine.scheduling.tally import Tally

_states: WeakKeyDictionary[BlockPool, PoolState] = WeakKeyDictionary()


class PoolState:
    """Beside a block pool of vLLM's, which gives each manager no other place to meet the others.

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
        """The one state of a block pool."""
        state = _states.get(block_pool)
        if state is None:
            state = _states[block_pool] = PoolState(block_pool)
        return state
