"""Pages a request holds stay within the bound and all come back."""

import pytest
from helpers import page_bound

from vllm_sepllm.oracle.dense_mask import first_difference
from vllm_sepllm.policy import KeepRule, table_of

pytestmark = pytest.mark.e2e

VOCABULARY = 4096


def kept_in(ids, separator_ids, sinks):
    table = table_of(separator_ids, VOCABULARY)
    return int(KeepRule(sinks, 1, table).kept_flags(ids).sum())


def run(engine, prompts, max_tokens, after_step=lambda step: None):
    """Run requests; their tokens, and pages and tokens of each after every step."""
    for name, prompt in prompts.items():
        engine.add(name, prompt, max_tokens)
    tokens, history, step = {}, [], 0
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs = engine.step()
        engine.check_integrity()
        live = engine.scheduler.requests.values()
        history += [(r, engine.held(r.request_id), r.num_computed_tokens) for r in live]
        for output in outputs:
            if output.finished:
                tokens[output.request_id] = output
        after_step(step)
        step += 1
    return tokens, history


@pytest.mark.parametrize(
    ("window", "sinks", "block_size", "chunk"),
    [(64, 4, 32, 256), (1, 0, 16, 64), (100, 33, 16, 96), (256, 4, 128, 512)],
)
def test_pages_held_stay_within_the_bound(
    engines, book, separator_ids, window, sinks, block_size, chunk
):
    engine = engines(
        sepllm={"window_size": window, "num_sink_tokens": sinks},
        block_size=block_size,
        max_num_batched_tokens=chunk,
    )
    engine.check_size()
    prompts = {"long": book[:1700], "short": book[5:20], "other": book[4000:4900]}
    _, history = run(engine, prompts, max_tokens=90)
    assert len(history) > 90
    for request, held, computed in history:
        ids = list(request.all_token_ids)
        kept = kept_in(ids[: computed + 1], separator_ids, sinks)
        bound = page_bound(kept, window, chunk, block_size)
        assert held <= bound
    # While decoding, the chunk is one token. Full attention would hold every page.
    long_held = [h for r, h, c in history if len(r.prompt_token_ids) == 1700 and c > 1701]
    if window <= 100:
        assert max(long_held) < 0.6 * 1700 / block_size
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_pages_come_back_after_aborts_in_every_phase(engines, book):
    engine = engines(sepllm={"window_size": 64}, max_num_seqs=2)
    prompts = {f"r{i}": book[i * 400 : i * 400 + 1200] for i in range(5)}
    phases = set()

    def abort(step):
        for request in list(engine.scheduler.requests.values()):
            name = request.request_id
            if not request.num_computed_tokens:
                phase = "waiting"
            elif request.num_computed_tokens < request.num_prompt_tokens:
                phase = "prefilling"
            else:
                phase = "decoding"
            if phase not in phases and step > 0:
                phases.add(phase)
                engine.abort([name.rsplit("-", 1)[0]])
                engine.check_integrity()
                return

    finished, _ = run(engine, prompts, 30, abort)
    assert phases == {"waiting", "prefilling", "decoding"}
    assert len(finished) >= 2
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_preempted_requests_resume_exactly(engines, book, reference_model, separator_ids):
    """Eight requests grow until the pool is full: some are preempted, the tokens are the same."""
    engine = engines(sepllm={"window_size": 64}, num_gpu_blocks_override=34, max_model_len=1024)
    prompts = {f"r{i}": book[i * 600 : i * 600 + 60] for i in range(8)}
    preemptions = set()

    def note(step):
        preemptions.update(
            r.request_id for r in engine.scheduler.requests.values() if r.num_preemptions
        )

    finished, _ = run(engine, prompts, 300, note)
    assert preemptions, "the pool was large enough, nothing was tested"
    for name, prompt in prompts.items():
        tokens = list(finished[name].outputs[0].token_ids)
        assert len(tokens) == 300
        assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_more_requests_run_at_once_in_the_same_memory(engines, book):
    """Admission counts SepLLM pages, not those of full attention."""
    most = {}
    for name, sepllm in (("sepllm", {"window_size": 64}), ("dense", None)):
        engine = engines(sepllm=sepllm, num_gpu_blocks_override=150, max_num_seqs=16)
        for i in range(14):
            engine.add(f"r{i}", book[i * 300 : i * 300 + 900], 40)
        most[name] = 0
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            running = [r for r in engine.scheduler.running if r.num_output_tokens]
            most[name] = max(most[name], len(running))
    assert most["dense"] <= 149 // 28
    assert most["sepllm"] >= 2 * most["dense"]


def test_start_up_serves_every_length_full_attention_serves(
    engines, book, reference_model, separator_ids
):
    """A pool of exactly one dense request of the full length is accepted, and serves it."""
    blocks = 2048 // 32 + 1  # and the null block
    assert engines(sepllm=None, num_gpu_blocks_override=blocks).llm
    for window in (1, 1024, 5000):
        engine = engines(
            sepllm={"window_size": window},
            num_gpu_blocks_override=blocks,
            max_num_batched_tokens=64,
        )
        assert engine.pool.num_gpu_blocks == blocks
        [answer] = engine.generate([book[:2000]], max_tokens=8, is_whole=False)
        output = answer.outputs[0]
        if window <= 1024:
            assert (
                first_difference(
                    reference_model, book[:2000], output.token_ids, separator_ids, 4, window
                )
                is None
            )
            assert output.finish_reason == "length"
        else:  # a window over the context beside the stream needs more than full attention
            assert output.finish_reason == "error"


def test_a_pool_too_small_for_ordinary_text_is_warned_of(
    engines, book, reference_model, separator_ids, monkeypatch
):
    """The window pages of a chunk as long as the context leave nothing to the stream.

    Such a text is served in smaller chunks.
    """
    from vllm_sepllm.engine.scheduling import scheduler

    said = []
    monkeypatch.setattr(scheduler.logger, "warning", lambda text, *a: said.append(text % a))
    options = {"sepllm": {"window_size": 64}, "num_gpu_blocks_override": 65}
    engine = engines(**options, max_num_batched_tokens=2048)
    [sentence] = said
    for part in ("2048 tokens of ordinary text", "64 there are", "max_num_batched_tokens (2048)"):
        assert part in sentence
    output = engine.generate([book[:2000]], max_tokens=4)[0].outputs[0]
    assert output.finish_reason == "length"
    options_of_mask = separator_ids, 4, 64
    tokens = list(output.token_ids)
    assert first_difference(reference_model, book[:2000], tokens, *options_of_mask) is None
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
    engines(**options, max_num_batched_tokens=256)
    assert len(said) == 1


def test_capacity_logged_at_start_up_counts_sepllm_pages(engines):
    def capacity(sepllm):
        engine = engines(sepllm=sepllm, num_gpu_blocks_override=600, max_num_batched_tokens=64)
        return engine.llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency

    plain = capacity(None)
    assert plain == pytest.approx(600 / 64)
    # A text of 2,048 tokens: 11 pages of its stream, of 342 tokens, and 5 of window and chunk.
    assert capacity({"window_size": 64, "planned_kept_share": 0.165}) == pytest.approx(600 / 16)
    # Planned for JSON, of which more is kept than of English.
    assert 2 * plain < capacity({"window_size": 64}) < 3 * plain


def test_a_request_that_can_never_fit_ends_with_an_error(
    engines, book, reference_model, separator_ids
):
    """Separators only, more of them than the pool has entries; the others are not disturbed."""
    engine = engines(sepllm={"window_size": 64}, num_gpu_blocks_override=66)
    comma = separator_ids[0]
    prompts = {"huge": [comma] * 2000, "fine": book[:300], "after": book[700:900]}
    finished, _ = run(engine, prompts, 20)
    reason = finished["huge"].outputs[0]
    assert reason.finish_reason == "error"
    assert "2000 tokens" in reason.stop_reason
    assert "65 there are" in reason.stop_reason
    for name in ("fine", "after"):
        engine.check_whole(finished[name], 20)
        tokens = list(finished[name].outputs[0].token_ids)
        prompt = prompts[name]
        assert first_difference(reference_model, prompt, tokens, separator_ids, 4, 64) is None
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_a_request_that_outgrows_the_pool_ends_with_an_error(engines, separator_ids):
    """It fits when it comes and writes separators until nothing is left."""
    engine = engines(sepllm={"window_size": 64}, num_gpu_blocks_override=66)
    comma = separator_ids[0]
    bias = {comma: 100.0}
    asked = {"max_tokens": 140, "logit_bias": bias, "is_whole": False}
    output = engine.generate([[comma] * 1900], **asked)[0].outputs[0]
    assert output.finish_reason == "error"
    assert set(output.token_ids) == {comma}
    assert "KV cache blocks" in output.stop_reason
    assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1


def test_metrics_of_an_offline_engine(engines, book, separator_ids):
    """``LLM.get_metrics`` has them where statistics are on, and they are what was held."""
    options = {"window_size": 64, "dense_layers": [0]}
    engine = engines(sepllm=options, disable_log_stats=False)
    engine.check_size()
    held = []

    def look(step):
        held.append((engine.pool.num_gpu_blocks - 1 - engine.pool.get_num_free_blocks(), pages()))

    def metric(name):
        found = [m for m in engine.llm.get_metrics() if m.name == f"vllm:sepllm_{name}"]
        assert found
        return found

    def pages():
        return sum(m.value for m in metric("pages_held"))

    output, _ = run(engine, {"it": book[:600]}, 8, look)
    assert held[0][0] == held[0][1] > 5
    assert held[-1] == (0, 0)
    tokens = [*book[:600], *output["it"].outputs[0].token_ids]
    behind = (606 - 64 + 1) // 32 * 32  # as the last step begins; it computes the last but one
    kept = kept_in(tokens[:behind], separator_ids, 4)
    assert [m.value for m in metric("tokens_kept")] == [kept]
    assert [m.value for m in metric("tokens_dropped")] == [behind - kept]
    [shares] = metric("request_kept_share")
    # The last token ends the request and is not computed.
    share = (kept_in(tokens[:-1], separator_ids, 4) - 4) / (len(tokens) - 5)
    assert shares.count == 1
    assert shares.sum == pytest.approx(share)
    assert [m.value for m in metric("seen_kept_share")] == [pytest.approx(share)]
