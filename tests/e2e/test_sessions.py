"""Streaming sessions: prompts that go on, turn by turn, in one request."""

import pytest

from vllm_sepllm.oracle.dense_mask import first_difference

pytestmark = pytest.mark.e2e


def turn(name, ids, resumable=True, max_tokens=5):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    return Request(
        request_id=name,
        prompt_token_ids=list(ids),
        sampling_params=SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
        pooling_params=None,
        resumable=resumable,
    )


def run(engine, steps=25):
    """Outputs of the engine core by request."""
    outputs = {}
    for _ in range(steps):
        for client in engine.core.step()[0].values():
            for output in client.outputs:
                outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    return outputs


def ends_beside(engine, prompt):
    """Why the session ends with an error, and what another request is answered meanwhile."""
    engine.scheduler.add_request(turn("other", prompt, resumable=False, max_tokens=8))
    outputs = run(engine)
    assert outputs["s"][-1].finish_reason.name == "ERROR"
    tokens = [token for output in outputs["other"] for token in output.new_token_ids]
    assert len(tokens) == 8
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
    return outputs["s"][-1].stop_reason, tokens


def test_turns_equal_the_reference_and_the_end_is_harmless(
    engines, book, reference_model, separator_ids
):
    engine = engines(sepllm={"window_size": 64}, num_gpu_blocks_override=66)
    scheduler = engine.scheduler
    for start in (0, 300, 700):
        scheduler.add_request(turn("s", book[start : start + 300]))
        run(engine)
        ids = list(scheduler.requests["s"].all_token_ids)
        prompt, tokens = ids[:-5], ids[-5:]
        assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None
    scheduler.add_request(turn("s", [5], resumable=False))
    run(engine, 3)
    assert "s" not in scheduler.requests
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_a_session_that_outgrows_the_pool_ends_with_an_error(
    engines, book, reference_model, separator_ids
):
    engine = engines(sepllm={"window_size": 64}, num_gpu_blocks_override=66)
    scheduler, comma = engine.scheduler, separator_ids[0]
    scheduler.add_request(turn("s", [comma] * 700))
    run(engine)
    scheduler.add_request(turn("s", [comma] * 1300))
    reason, tokens = ends_beside(engine, book[:200])
    assert "KV cache blocks" in reason
    assert first_difference(reference_model, book[:200], tokens, separator_ids, 4, 64) is None


def test_a_session_that_outgrows_the_model_ends_with_an_error(
    engines, book, reference_model, separator_ids
):
    """vLLM's worker has no place for more than ``max_model_len`` tokens, and would raise."""
    engine = engines(sepllm={"window_size": 64}, num_gpu_blocks_override=66, max_model_len=1024)
    scheduler = engine.scheduler
    scheduler.add_request(turn("s", book[:600]))
    run(engine)
    scheduler.add_request(turn("s", book[600:1200]))
    reason, tokens = ends_beside(engine, book[:200])
    assert "leave no room for an answer in max_model_len (1024)" in reason
    assert first_difference(reference_model, book[:200], tokens, separator_ids, 4, 64) is None
