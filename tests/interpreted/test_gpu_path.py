"""The GPU backend in an engine on a CPU, run by ``e2e/test_gpu_path.py`` for each model runner.

Triton's interpreter takes milliseconds for each program of a kernel: so prompts are short, and the
model is the first of the demo model's layers.
"""

import copy
import os

import pytest
import torch
from helpers import NGRAM, CacheReference, Reference, usual_spans
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from triton.runtime.interpreter import InterpretedFunction
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform
from xformers_masks import attend_under_bias

from vllm_sepllm.engine.gpu.backend import SepLLMGPUImpl
from vllm_sepllm.engine.gpu.counts import DeviceCounts

pytestmark = pytest.mark.e2e

WINDOW, SINKS = 20, 3
# One prompt of 511 separators fits and nothing beside it; with two steps in flight it needs more.
NUM_BLOCKS = 44 if os.environ.get("SEPLLM_TEST_ASYNC_SCHEDULING") == "1" else 40
OPTIONS = {
    "sepllm": {"window_size": WINDOW, "num_sink_tokens": SINKS},
    "block_size": 16,
    "max_num_batched_tokens": 64,
    "max_model_len": 512,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": NUM_BLOCKS,
    "scheduler_reserve_full_isl": False,
    "scheduling_policy": "priority",
}


def options_with(**sepllm):
    """``OPTIONS`` with other SepLLM options beside its own."""
    return {**OPTIONS, "sepllm": {**OPTIONS["sepllm"], **sepllm}}


LAYERS = 2


@pytest.fixture(scope="session")
def reference_model(first_layers):
    return first_layers(LAYERS)[0]


@pytest.fixture(scope="session")
def engines(engines, first_layers):
    def get(num_layers=LAYERS, **options):
        return engines(model=first_layers(num_layers)[1], **options)

    return get


@pytest.fixture
def engine(engines):
    assert os.environ["SEPLLM_TEST_GPU_PATH"] == "1"
    engine = engines(**OPTIONS)
    worker = engine.core.model_executor.driver_worker.worker
    assert all(isinstance(x.impl, SepLLMGPUImpl) for x in worker.sepllm_layers().values())
    assert len(worker.sepllm_layers()) == worker.model_config.get_total_num_hidden_layers()
    assert worker.cache_config.kv_cache_layout == "LBHNC"
    assert engine.llm.reset_prefix_cache()
    yield engine
    engine.check_empty()


@pytest.fixture
def make_reference(first_layers, separator_ids):
    """A reference with other options than its window and sinks."""

    def make(kind=Reference, *, separators=separator_ids, window=WINDOW, layers=LAYERS, **options):
        return kind(first_layers(layers)[0], separators, SINKS, window, **options)

    return make


@pytest.fixture
def reference(make_reference):
    return make_reference()


def run(engine, prompts, max_tokens):
    """Greedy answers, each token with its log-probability."""
    outputs = engine.generate(prompts, max_tokens=max_tokens, logprobs=0)
    assert all(len(output.outputs[0].token_ids) == max_tokens for output in outputs)
    return outputs


def test_chunks_and_mixed_batches(engine, book, separator_ids, reference):
    """Prompts of several chunks and of less than one, computed while others decode."""
    prompts = [book[:110], book[100:102], book[300:340], list(separator_ids[:2]) * 35]
    for output in run(engine, prompts, max_tokens=10):
        reference.check_output(output)


def test_prefix_hits(engine, book, reference):
    """A conversation that goes on, and another that parts inside a page."""
    first = book[:120]
    answer = list(run(engine, [first], max_tokens=8)[0].outputs[0].token_ids)
    for prompt in (first + answer + book[500:530], first[:77] + book[600:640]):
        output = run(engine, [prompt], max_tokens=8)[0]
        assert output.num_cached_tokens >= 64
        reference.check_output(output)


def test_preemption(engine, book, separator_ids, reference):
    requests = {
        "prose": {"prompt": book[:100], "max_tokens": 12, "logprobs": 0},
        "short": {"prompt": book[200:220], "max_tokens": 12, "logprobs": 0},
    }
    for output in engine.serve(requests, [separator_ids[0]] * 511).values():
        reference.check_output(output)


def test_bfloat16(engines, book, reference_model, make_reference):
    """No further from float32 than twice the same model in bfloat16 under the same mask, in the
    prompt and behind it; what is only held between two kernels is held in float32."""
    engine = engines(**OPTIONS, dtype="bfloat16")
    impls = engine.core.model_executor.driver_worker.worker.sepllm_layers().values()
    assert all(x.impl._buffers.partial.dtype == torch.float32 for x in impls)
    output = engine.generate([book[:130]], max_tokens=12, prompt_logprobs=0, logprobs=0)[0]
    answer = output.outputs[0]
    tokens = book[:130] + list(answer.token_ids)
    entries = [*output.prompt_logprobs[1:], *answer.logprobs]
    picked = torch.tensor(tokens[1:])[:, None]
    given = torch.tensor(
        [entry[token].logprob for entry, token in zip(entries, tokens[1:], strict=True)]
    )
    reference, rounded_model = make_reference(), copy.deepcopy(reference_model).bfloat16()
    exact, rounded = (
        reference.logits(tokens, model)[:-1].float().log_softmax(-1).gather(1, picked)[:, 0]
        for model in (reference_model, rounded_model)
    )
    for part in (slice(0, 129), slice(129, None)):
        found, allowed = (given - exact)[part].abs(), 2 * (rounded - exact)[part].abs()
        assert found.mean() <= allowed.mean()
        assert found.max() <= allowed.max()
    engine.check_empty()


def attend_to_fp8(module, query, key, value, *args, **kwargs):
    """Keys and values become FP8 (e4m3) before attention, as in pages without calibration."""
    key, value = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value))
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


def test_fp8_pages(engines, book, reference, monkeypatch):
    """Greedy tokens are those of keys and values in FP8. What lies between two numbers of FP8 may
    become either, where float32 rounds: less than a tenth of what FP8 does to log-probabilities."""
    engine = engines(**OPTIONS, kv_cache_dtype="fp8")
    outputs = run(engine, [book[:80], book[300:320]], max_tokens=14)
    answers = [
        (list(output.prompt_token_ids), list(output.outputs[0].token_ids)) for output in outputs
    ]
    unrounded = [reference.rows(*answer).log_softmax(-1) for answer in answers]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attend_to_fp8)
    for output, answer, wide in zip(outputs, answers, unrounded, strict=True):
        reference.check(*answer)
        tokens = answer[1]
        expected = reference.rows(*answer).log_softmax(-1)
        entries = zip(output.outputs[0].logprobs, tokens, strict=True)
        given = torch.tensor([entry[token].logprob for entry, token in entries])
        error = (given - expected[range(len(tokens)), tokens]).abs().max()
        assert error < (wide - expected).abs().max() / 10
    engine.check_empty()


def test_drafts(engines, book, make_reference):
    """Some are accepted, some rejected, inside spans too."""
    spans, after = usual_spans()
    engine = engines(**options_with(**spans), speculative_config=NGRAM)
    reference = make_reference(after=after)
    prompts = [book[:60] + book[:40], book[300:330]]
    counts = engine.count_drafts()
    for output in run(engine, prompts, max_tokens=24):
        reference.check_output(output)
    assert counts["drafted"] > counts["accepted"] > 0, "nothing was drafted, accepted or rejected"
    engine.check_empty()


def test_bounded_separators(engines, book, make_reference):
    """Chunks and decoding, while pages of the stream leave."""
    engine = engines(**options_with(max_separator_tokens=5))
    for output in run(engine, [book[:150], book[300:330]], max_tokens=10):
        make_reference(bound=5).check_output(output)
    engine.check_empty()


@pytest.mark.parametrize("bound", [None, 5])
def test_cache_positions(engines, book, make_reference, bound):
    """Chunks, decoding beside a prompt, and a prefix found in the cache; with a bound, spans."""
    spans, after = usual_spans() if bound else ({}, None)
    engine = engines(**options_with(max_separator_tokens=bound, position_mode="cache", **spans))
    reference = make_reference(CacheReference, bound=bound, after=after)
    for prompts in ([book[:100], book[300:320]], [book[:80] + book[600:612]]):
        for output in run(engine, prompts, max_tokens=12):
            reference.check_output(output)
    assert output.num_cached_tokens >= 64
    engine.check_empty()


def test_an_interval(engines, book, make_reference):
    engine = engines(**options_with(policy="fixed_interval", interval=5))
    reference = make_reference(separators=(), interval=5)
    reference.check_output(run(engine, [book[:90]], max_tokens=8)[0])
    engine.check_empty()


@pytest.fixture
def xformers_calls(monkeypatch):
    """Tokens of each call of xformers' attention."""
    from sepllm_kernels.paged.prefill import xformers_window

    def attend(query, *args, **kwargs):
        calls.append(query.shape[1])
        return attend_under_bias(query, *args, **kwargs)

    calls = []
    monkeypatch.setattr(xformers_window, "memory_efficient_attention_partial", attend)
    return calls


@pytest.mark.parametrize("position_mode", ["original", "cache"])
def test_prompts_with_xformers(engines, book, make_reference, xformers_calls, position_mode):
    """Chunks, a short prompt, and chunks of one while another decodes."""
    engine = engines(**options_with(prefill_kernel="xformers", position_mode=position_mode))
    prompts, reference = [book[:100], book[100:102], book[300:330]], make_reference()
    if position_mode == "cache":
        prompts, reference = [book[:80], book[100:102]], make_reference(CacheReference)
    for output in run(engine, prompts, max_tokens=8):
        reference.check_output(output)
    assert max(xformers_calls) > 1, "xformers was only asked, at start-up, whether it can"
    engine.check_empty()


NEEDS_V2 = pytest.mark.skipif(
    os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1", reason="vLLM's V2 model runner"
)
OF_THE_STEP = {"queries", "query", "key", "value", "output"}  # in a graph's own memory


@pytest.fixture
def launches(monkeypatch):
    """Our kernels' launches: name, grid, and what it was given, tensors by address and strides."""
    found = []
    run = InterpretedFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        if self.fn.__module__.startswith("sepllm_kernels"):
            given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
            if given.get("HALF") == 0:
                del given["stream_cos_sin"]  # not read
            shown = {
                name: (x.data_ptr(), x.stride()) if torch.is_tensor(x) else x
                for name, x in given.items()
                if name not in OF_THE_STEP
            }
            found.append((self.fn.__name__, grid, shown))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return found


def run_as_for_capture(runner, num_reqs):
    """What vLLM captures for as many requests with a token each."""
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "1":
        runner._dummy_run(
            num_reqs,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,  # that of the run before
            force_attention=True,
            uniform_decode=True,
        )
        return
    from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

    state = runner.model_state, runner.input_buffers, runner.block_tables
    groups = runner.attn_groups, runner.kv_cache_config
    metadata, slots = prepare_inputs_to_capture(
        num_reqs, num_reqs, *state, *groups, full_cudagraph=True, max_query_len=1
    )
    inputs = {name: getattr(state[1], name)[:num_reqs] for name in ("input_ids", "positions")}
    sizes = {"num_tokens": num_reqs, "slot_mapping": slots}
    with torch.inference_mode(), set_forward_context(metadata, runner.vllm_config, **sizes):
        runner.model(**inputs)


BOUNDED_SPANS = {"max_separator_tokens": 5, "position_mode": "cache", **usual_spans()[0]}


@pytest.mark.parametrize("options", [{}, BOUNDED_SPANS])
def test_a_captured_graph_would_do_the_same(engines, book, launches, options):
    """A CUDA graph launches again what was launched when it was captured, of requests vLLM made up:
    as many, and reading and writing the same memory, as a step of as many requests needs."""
    engine = engines(**options_with(**options))
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    launches.clear()
    run_as_for_capture(runner, 3)
    captured = list(launches)
    for name, prompt in enumerate((book[:30], book[100:103], book[200:220])):
        engine.add(str(name), prompt, max_tokens=6)
    for _ in range(4):
        launches.clear()
        engine.step()
    assert [name for name, _, _ in launches[:2]] == ["_kept_metadata", "_decode_plan"]
    assert captured[0][0] == "_decode_plan", "tokens that nobody sent were counted"
    assert captured[1:] == launches[2:]
    names = [name for name, _, _ in captured]
    assert names.count("_decode") == names.count("_merge") == LAYERS
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.step()
    engine.check_empty()


@pytest.fixture
def replay_graphs(monkeypatch):
    """vLLM's manager of CUDA graphs, with the metadata of the capture kept instead of a graph.

    A replay runs the model with what its capture was given: the sizes and addresses of requests
    that vLLM made up, while a step fills the buffers behind them. What runs is noted by its size.
    """
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

    class Graph:
        def __init__(self, desc, forward):
            self.desc, self.forward = desc, forward

        def replay(self):
            replayed.append((self.desc.num_reqs, self.desc.uniform_token_count))
            self.forward(CUDAGraphMode.NONE)

    def capture(self, create_forward_fn, progress_bar_desc=""):
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            for warmup in (True, False):
                forward = create_forward_fn(desc, warmup=warmup)
                forward(CUDAGraphMode.NONE)
            self.graphs[desc] = Graph(desc, forward)
        self._graphs_captured = True

    def replay_graphs(engine, sizes):
        runner = engine.core.model_executor.driver_worker.worker.model_runner
        config = runner.compilation_config
        monkeypatch.setattr(config, "cudagraph_capture_sizes", sizes)
        monkeypatch.setattr(config, "max_cudagraph_capture_size", max(sizes))
        mode = CUDAGraphMode.FULL_DECODE_ONLY
        manager = ModelCudaGraphManager(
            runner.vllm_config, runner.device, mode, decode_query_len=runner.decode_query_len
        )
        names = "model", "model_state", "input_buffers", "intermediate_tensors", "block_tables"
        names += "attn_groups", "kv_cache_config"
        manager.capture(*(getattr(runner, name) for name in names))
        monkeypatch.setattr(runner, "cudagraph_manager", manager)
        replayed.clear()
        return replayed

    replayed = []
    monkeypatch.setattr(CudaGraphManager, "capture", capture)
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    return replay_graphs


@NEEDS_V2
def test_replayed_graphs(engines, book, make_reference, replay_graphs):
    """Requests decode in graphs that were captured for more of them, beside prompts without."""
    engine = engines(**options_with(**BOUNDED_SPANS))
    reference = make_reference(CacheReference, bound=5, after=usual_spans()[1])
    replayed = replay_graphs(engine, sizes=[2, 4])
    prompts = [book[:70], book[100:102], book[300:318]]
    for output in run(engine, prompts, max_tokens=7):
        reference.check_output(output)
    assert (4, 1) in replayed
    for output in run(engine, [book[500:530]], max_tokens=4):
        reference.check_output(output)
    assert replayed[-1] == (2, 1)
    engine.check_empty()


@NEEDS_V2
def test_replayed_graphs_of_drafts(engines, book, reference, replay_graphs):
    """Of steps in which each request has all drafts it may have; others run without a graph."""
    engine = engines(**OPTIONS, speculative_config=NGRAM)
    length = 1 + NGRAM["num_speculative_tokens"]
    replayed = replay_graphs(engine, sizes=[4 * length])
    counts = engine.count_drafts()
    prompts = [book[:60] + book[:40], book[300:330], book[700:720] * 2]
    for output in run(engine, prompts, max_tokens=16):
        reference.check_output(output)
    assert set(replayed) == {(4, length)}
    assert counts["drafted"] > counts["accepted"] > 0
    engine.check_empty()


@NEEDS_V2
def test_after_the_warm_up(engine, book, reference, monkeypatch):
    """On a GPU, steps of made-up requests run before graphs are captured."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

    # The interpreter cannot run vLLM's kernel of top-k and top-p.
    greedy = SamplingParams(temperature=0)
    monkeypatch.setattr(SamplingParams, "for_sampler_warmup", lambda: greedy)
    worker = engine.core.model_executor.driver_worker.worker
    steps = worker.model_runner, worker.execute_model, worker.sample_tokens
    warmup_kernels(*steps)
    assert run_mixed_prefill_decode_warmup(*steps, num_tokens=40)
    for output in run(engine, [book[:100]], max_tokens=4):
        reference.check_output(output)


def test_several_groups(engines, book, separator_ids, make_reference, monkeypatch):
    """Two groups of kept tokens, one of each layer that is not dense; the dense one runs vLLM's
    Triton backend. Answers outgrow the window, and memory: a request is preempted and resumes."""
    # Which vLLM asks for when it launches its kernel.
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    window = 6
    sizes = {"block_size": 32, "max_model_len": 64, "num_gpu_blocks_override": 12}
    spans, after = usual_spans()
    sepllm = {"dense_layers": [-2], "window_size": window, **spans}
    engine = engines(3, **{**options_with(**sepllm), **sizes})
    assert [type(manager).__name__ for manager in engine.managers].count("KeptManager") == 2
    reference = make_reference(window=window, layers=3, dense_layers=[1], after=after)
    outputs, preempted, restarts = [], set(), []
    restart = DeviceCounts.restart

    def record(self, *args):
        restarts.append(args)
        restart(self, *args)

    monkeypatch.setattr(DeviceCounts, "restart", record)
    for name, start in (("a", 300), ("b", 100)):
        engine.add(name, book[start : start + 22], max_tokens=16, logprobs=0)
    while engine.llm.llm_engine.has_unfinished_requests():
        outputs += engine.step()
        live = engine.scheduler.requests
        preempted |= {name for name, request in live.items() if request.num_preemptions}
    assert len(preempted) == 1, "memory was not short"
    assert len(restarts) == 3, "more was counted on the host than starts and one resumes"
    for output in outputs:
        reference.check_output(output)
        seen = output.outputs[0].token_ids[:-window]
        assert set(seen) & set(separator_ids), "no separator was generated"
    engine.check_empty()
