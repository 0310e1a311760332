"""``dense_layers``: some layers keep full attention, the others are SepLLM's.

vLLM gives layers of one kind groups of equal size, so the demo model's 6 layers make 5 groups,
11 and 7 here.
"""

import pytest

from vllm_sepllm.engine.scheduling.eviction import VISITS
from vllm_sepllm.engine.scheduling.kept_manager import KeptManager
from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.oracle.dense_mask import first_difference

pytestmark = pytest.mark.e2e

WINDOW, SINKS = 64, 4


@pytest.mark.parametrize(
    ("layers", "groups"), [([0, -1], (1, 2, 2)), ([1], (1, 5, 5)), ([0, 1, 2, 3, 4], (5, 1, 1))]
)
def test_dense_layers(engines, book, reference_model, separator_ids, layers, groups):
    engine = engines(
        sepllm={
            "window_size": WINDOW,
            "num_sink_tokens": SINKS,
            "dense_layers": layers,
            "planned_kept_share": 0.165,  # of English prose; of JSON a start asks for more pages
        },
        enable_prefix_caching=True,
        max_model_len=1056,
        max_num_batched_tokens=128,
        # Little more than the longest needs.
        num_gpu_blocks_override=2 + 36 * groups[0] + 9 * groups[1] + 9 * groups[2],
        scheduler_reserve_full_isl=False,
    )
    kinds = [type(manager).__name__ for manager in engine.managers]
    found = tuple(map(kinds.count, ("FullAttentionManager", "WindowManager", "KeptManager")))
    assert found == groups

    prompts = [book[:1000], book[100:130], book[:600] + book[3000:3300], book[2000:2064]]
    prompts += [book[i : i + 300] for i in range(4000, 5200, 300)]
    dense = [layer % 6 for layer in layers]

    def check(prompt, tokens):
        arguments = reference_model, prompt, tokens, separator_ids, SINKS, WINDOW
        assert first_difference(*arguments, dense) is None
        return arguments

    for index, prompt in enumerate(prompts):
        engine.add(str(index), prompt, max_tokens=40)
    preempted = False
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.step():
            check(prompts[int(output.request_id)], list(output.outputs[0].token_ids))
        engine.check_integrity()
        live = engine.scheduler.requests.values()
        preempted |= any(request.num_preemptions for request in live)
    assert preempted
    engine.check_empty()

    [cold] = engine.tokens(prompts[:1], 40)
    visits = PoolState.of(engine.pool).junctions._visits
    before = sum(visits.values())
    [warm] = engine.generate(prompts[:1], 40)
    assert sum(visits.values()) == before + VISITS, "groups count one by one"
    assert list(warm.outputs[0].token_ids) == cold
    assert warm.num_cached_tokens == 992
    arguments = check(prompts[0], cold)
    # The comparison tells the layers apart.
    assert first_difference(*arguments, [2, 3]) is not None


def test_pages_of_dense_layers(engines, book):
    """Groups of dense layers hold every token, the others what SepLLM holds."""
    engine = engines(
        sepllm={"window_size": WINDOW, "num_sink_tokens": SINKS, "dense_layers": [0, -1]},
        enable_prefix_caching=True,
        max_model_len=1056,
        max_num_batched_tokens=128,
    )
    engine.add("a", book[:1000], max_tokens=40)
    [name] = engine.scheduler.requests
    while not engine.scheduler.requests[name].num_output_tokens:
        engine.step()
    held = {}
    for manager in engine.managers:
        pages = sum(not block.is_null for block in manager.req_to_blocks[name])
        held.setdefault(type(manager).__name__, set()).add(pages)
    kept = engine.managers[-1]
    assert isinstance(kept, KeptManager)
    assert held == {
        "FullAttentionManager": {32},  # 1,001 tokens on pages of 32
        # Of the last chunk, from 896 on, and of the window before it.
        "WindowManager": {1000 // 32 - (896 - 63) // 32 + 1},
        "KeptManager": {kept.num_pages(name, 1001)},
    }
    engine.check_integrity()
    engine.abort(["a"])
    engine.step()
    engine.check_empty()
