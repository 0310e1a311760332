"""What tests share: the demo model's files, an engine stepped by hand, integrity checks."""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "examples/models/pg19-5m-sep")
SMOLLM2 = ROOT / "build/models/SmolLM2-135M-Instruct"
BOOK = ROOT / "examples/data/860.txt"
EOS = 1

# Room for a dozen ordinary requests, and for one prompt of 2,040 separators but not a page more.
SMALL_POOL: dict[str, Any] = {
    "sepllm": {"window_size": 64, "num_sink_tokens": 4},
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 84,
    "max_num_batched_tokens": 512,
    "scheduling_policy": "priority",
    "scheduler_reserve_full_isl": False,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
POOL_FILLING_TOKENS = 2040
NGRAM: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@cache
def book_tokens() -> list[int]:
    text = BOOK.read_text(encoding="utf8")
    return tokenizer()(text[2000:60000], add_special_tokens=False).input_ids


def find_separators(**options: Any) -> tuple[int, ...]:
    from vllm_sepllm.config import SepLLMConfig
    from vllm_sepllm.separators import resolve_separators

    return resolve_separators(SepLLMConfig(**options), tokenizer()).token_ids


def span_options(
    keep_after: Mapping[int, int], ends: Iterable[int], others: Iterable[int] = ()
) -> tuple[dict[str, Any], Any]:
    """SepLLM options that keep ids and tokens behind them, and the oracle's word for the latter.

    Args:
        keep_after: tokens kept behind each id.
        ends: ids that end a segment.
        others: ids that are kept and keep nothing behind themselves.
    """
    from vllm_sepllm.oracle.dense_mask import KeptAfter

    pairs = [[number, [token_id]] for token_id, number in keep_after.items()]
    options = {"keep": [*keep_after, *others], "keep_after": pairs, "segment_ends": list(ends)}
    return options, KeptAfter(keep_after, frozenset(ends))


@cache
def usual_spans() -> tuple[dict[str, Any], Any]:
    """:func:`span_options` of the demo model: a comma keeps 4 tokens behind itself, a newline 2, a
    full stop ends a segment, and all separators are kept."""
    comma, stop, newline = (find_separators(separators=[text])[0] for text in (",", ".", "\n"))
    return span_options({comma: 4, newline: 2}, [stop], find_separators())


class Engine:
    """A vLLM engine in this process.

    Keyword arguments are vLLM's; ``sepllm`` holds the SepLLM options, ``None`` selects vLLM's
    own attention.
    """

    def __init__(
        self,
        sepllm: dict[str, Any] | None,
        model: str = MODEL,
        memory_mib: int = 64,
        **options: Any,
    ) -> None:
        from vllm import LLM

        defaults: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 256,
            "block_size": 32,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": memory_mib << 20,
        }
        if sepllm is not None:
            defaults["attention_backend"] = "sepllm"
            defaults["additional_config"] = {"sepllm": sepllm}
        self.arguments: dict[str, Any] = {"model": model, **defaults, **options}
        self.llm = LLM(**self.arguments)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self._check_runner()
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers

    def _check_runner(self) -> None:
        """It runs what the environment selects (``e2e/test_gpu_path.py``)."""
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler

        runner = type(self.core.model_executor.driver_worker.worker.model_runner)
        is_v2 = runner.__module__ == "vllm.v1.worker.cpu.model_runner"
        assert is_v2 == (os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")
        is_async = isinstance(self.scheduler, AsyncScheduler)
        assert is_async == (self.core.batch_queue is not None)
        assert is_async == (os.environ.get("SEPLLM_TEST_ASYNC_SCHEDULING") == "1")

    def generate(
        self, prompts: list[list[int]], max_tokens: int = 24, is_whole: bool = True, **params: Any
    ) -> list[Any]:
        """Greedy completions, one ``RequestOutput`` per prompt.

        Args:
            prompts: token ids.
            max_tokens: of each answer.
            is_whole: every answer must have as many tokens, or all that there is room for; but for
                those that may stop at the end of text (``ignore_eos=False``).
            params: more of vLLM's ``SamplingParams``.
        """
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=max_tokens, **{"temperature": 0, "ignore_eos": True, **params}
        )
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        if is_whole and sampling.ignore_eos:
            for output in outputs:
                self.check_whole(output, max_tokens)
        return outputs

    def check_whole(self, output: Any, max_tokens: int) -> None:
        """An answer was not refused, and not cut off before it had to end."""
        room = self.llm.llm_engine.model_config.max_model_len - len(output.prompt_token_ids)
        for sample in output.outputs:
            assert sample.finish_reason == "length", sample.stop_reason
            assert len(sample.token_ids) == min(max_tokens, room)

    def tokens(self, prompts: list[list[int]], max_tokens: int = 24, **params: Any) -> list[Any]:
        """Only the token ids."""
        outputs = self.generate(prompts, max_tokens, **params)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def add(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int = 24,
        priority: int = 0,
        lora: Any = None,
        **params: Any,
    ) -> None:
        """Queue a request for :meth:`step`, greedy unless ``params`` say otherwise.

        It has one output, when it is finished.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        final = RequestOutputKind.FINAL_ONLY
        given = {"temperature": 0, "ignore_eos": True, "output_kind": final, **params}
        self.llm.llm_engine.add_request(
            name,
            {"prompt_token_ids": prompt},
            SamplingParams(max_tokens=max_tokens, **given),
            lora_request=lora,
            priority=priority,
        )

    def step(self) -> list[Any]:
        return self.llm.llm_engine.step()

    def abort(self, names: list[str]) -> None:
        self.llm.llm_engine.abort_request(names)

    def held(self, request_id: str) -> int:
        """Pages a request holds in all groups."""
        return sum(
            sum(not block.is_null for block in manager.req_to_blocks.get(request_id, ()))
            for manager in self.managers
        )

    def check_integrity(self) -> None:
        check_integrity(self.managers, self.pool)

    def check_empty(self) -> None:
        """No request is left and all pages came back.

        Requests that are left end here, so that the next test does not meet them.
        """
        left = list(self.scheduler.requests)
        self.llm.llm_engine.abort_request(left, internal=True)
        self.check_integrity()
        assert not left, "requests are left"
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1, "pages are left"

    def serve(
        self, requests: dict[str, dict[str, Any]], intruder: list[int] | None = None
    ) -> dict[str, Any]:
        """Run requests together, with an integrity check after every step.

        Args:
            requests: arguments of :meth:`add` by name.
            intruder: a prompt that is added when all of them decode, and computed before them.
                It must leave no room: every request is preempted, and resumes after it. Needs
                ``scheduling_policy="priority"``.

        Returns:
            The last ``RequestOutput`` of each.
        """
        for name, arguments in requests.items():
            self.add(name, **{"priority": 1, **arguments})
        mine = set(self.scheduler.requests)
        finished: dict[str, Any] = {}
        preempted: set[str] = set()
        waiting = intruder
        while self.llm.llm_engine.has_unfinished_requests():
            outputs = self.step()
            self.check_integrity()
            finished.update({output.request_id: output for output in outputs})
            live = self.scheduler.requests
            preempted |= {name for name, request in live.items() if request.num_preemptions}
            if waiting and all(request.num_output_tokens for request in live.values()):
                assert live.keys() == mine, "requests ended before memory was short"
                self.add("intruder", waiting, max_tokens=1)
                waiting = None
        assert preempted == (mine if intruder else set()), "preempted are not those who should be"
        for name in requests:
            for sample in finished[name].outputs:
                assert sample.finish_reason in ("length", "stop"), sample.stop_reason
        self.check_empty()
        return {name: finished[name] for name in requests}

    def count_drafts(self) -> Counter[str]:
        """Tokens ``drafted`` and ``accepted`` from now on."""
        counts: Counter[str] = Counter()
        update = self.scheduler.make_spec_decoding_stats

        def count(
            stats: Any, num_draft_tokens: int, num_accepted_tokens: int, *args: Any, **kwargs: Any
        ) -> Any:
            counts.update(drafted=num_draft_tokens, accepted=num_accepted_tokens)
            return update(stats, num_draft_tokens, num_accepted_tokens, *args, **kwargs)

        self.scheduler.make_spec_decoding_stats = count
        return counts

    def check_size(self) -> None:
        """What the command ``size`` says is what this engine has, and has logged."""
        from vllm_sepllm.engine.sizing import sizes

        arguments = dict(self.arguments)
        memory = arguments.pop("kv_cache_memory_bytes")
        options = arguments.pop("additional_config")["sepllm"]
        del arguments["attention_backend"]
        found = sizes(arguments, options, memory).sepllm
        cache = self.llm.llm_engine.vllm_config.cache_config
        logged = cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency
        assert (found.num_tokens, found.concurrency) == logged
        assert found.num_pages == cache.num_gpu_blocks == self.pool.num_gpu_blocks

    def close(self) -> None:
        from vllm_sepllm.engine.in_process import clean_up

        if self.llm is not None:  # a failure's traceback may hold the engine: it is ended here
            self.llm.llm_engine.engine_core.shutdown()
        self.llm = self.core = self.scheduler = self.pool = self.managers = None
        clean_up()


def check_integrity(managers: Any, pool: Any) -> None:
    """Every page is free or held, shared only as often as it is referenced, none is lost."""
    holders: Counter[int] = Counter()
    for manager in managers:
        in_group: Counter[int] = Counter()
        for blocks in manager.req_to_blocks.values():
            in_group.update({block.block_id for block in blocks if not block.is_null})
        assert not holders.keys() & in_group.keys(), "a page is held in two groups"
        holders += in_group
    for block_id, count in holders.items():
        assert pool.blocks[block_id].ref_cnt == count, "references and holders differ"
    free = pool.get_num_free_blocks()
    assert free + len(holders) == pool.num_gpu_blocks - 1, "pages are lost"


class Reference:
    """A Hugging Face model under the explicit mask, and comparisons with it."""

    def __init__(
        self,
        model: Any,
        separator_ids: Sequence[int],
        sinks: int,
        window: int,
        bound: int | None = None,
        interval: int | None = None,
        dense_layers: Sequence[int] = (),
        after: Any = None,
    ) -> None:
        self.model = model
        self._mask_options = separator_ids, sinks, window
        self._options: dict[str, Any] = {"max_separators": bound, "interval": interval}
        self._options["after"] = after
        self._dense_layers = dense_layers
        self._double: Any = None

    def logits(self, token_ids: Sequence[int], model: Any = None) -> Any:
        """``[len(token_ids), vocab_size]``, in the model's dtype."""
        from vllm_sepllm.oracle.dense_mask import masked_logits, sepllm_mask

        mask = sepllm_mask(token_ids, *self._mask_options, **self._options)
        return masked_logits(model or self.model, token_ids, mask, self._dense_layers)

    def rows(self, prompt: Sequence[int], generated: Sequence[int]) -> Any:
        """The logits each generated token is chosen from, ``[len(generated), vocab_size]``."""
        return self.logits([*prompt, *generated])[len(prompt) - 1 : -1]

    def check(
        self,
        prompt: Sequence[int],
        generated: Sequence[int],
        rule: Callable[[Any, list[int]], None] = lambda row, before: None,
    ) -> None:
        """Each generated token is the best one, after ``rule`` has changed the logits in place.

        One forward pass suffices: as long as all tokens so far agree, the reference's own run
        would have had the same input.
        """
        assert generated
        for step, row in enumerate(self.rows(prompt, generated)):
            rule(row, list(generated[:step]))
            best = int(row.argmax())
            assert generated[step] == best, f"step {step}: {generated[step]} instead of {best}"

    def check_output(self, output: Any) -> None:
        """Tokens of a greedy answer and their log-probabilities (``logprobs=0``)."""
        prompt, answer = list(output.prompt_token_ids), output.outputs[0]
        tokens = list(answer.token_ids)
        self.check(prompt, tokens)
        entries = dict(enumerate(answer.logprobs, len(prompt)))
        self.check_log_probs([*prompt, *tokens], entries)

    def check_log_probs(
        self, token_ids: Sequence[int], entries: Mapping[int, Mapping[int, Any]], top: int = 0
    ) -> None:
        """Log-probabilities of tokens are those of the reference, in float32.

        Args:
            token_ids: the whole sequence.
            entries: by position, vLLM's ``Logprob`` by token; the position's own is among them.
            top: so many of them are the best there are.
        """
        import torch

        if self._double is None:
            self._double = copy.deepcopy(self.model).double()
        exact = self.logits(token_ids, self._double).log_softmax(-1)
        rounded = self.logits(token_ids).log_softmax(-1).double()
        # What float32 alone does to the same model, twice; and the last bit of the largest value.
        bound = 2 * (rounded - exact).abs().max()
        bound += torch.finfo(torch.float32).eps * exact.abs().max()
        assert entries
        for place, entry in entries.items():
            assert token_ids[place] in entry
            expected = exact[place - 1]
            given = {token: found.logprob for token, found in entry.items()}
            for token, value in given.items():
                assert abs(value - expected[token]) <= bound, "another log-probability"
            best = torch.tensor(sorted(given.values(), reverse=True)[:top])
            assert len(best) == top
            assert (best - expected.topk(top).values).abs().le(bound).all()


class CacheReference(Reference):
    """Compares with logits in cache positions."""

    def __init__(
        self,
        model: Any,
        separator_ids: Sequence[int],
        sinks: int,
        window: int,
        bound: int | None = None,
        is_neox: bool = True,
        interval: int | None = None,
        after: Any = None,
    ) -> None:
        super().__init__(model, separator_ids, sinks, window, bound, interval, after=after)
        self._options["is_neox"] = is_neox

    def logits(self, token_ids: Sequence[int], model: Any = None) -> Any:
        from vllm_sepllm.oracle.cache_positions import cache_position_logits

        model = model or self.model
        return cache_position_logits(model, token_ids, *self._mask_options, **self._options)


def save_random_model(config: Any, path: Path) -> Any:
    """A model with weights large enough for clear maxima, and the demo model's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{MODEL}/{name}", path)
    return model.eval()


def page_bound(kept: int, window: int, chunk: int, block_size: int) -> int:
    """Pages a request may hold: stream, window, and the chunk being computed."""
    pages = math.ceil(kept / block_size) + math.ceil((window - 1) / block_size) + 1
    return pages + math.ceil(chunk / block_size)


def make_kept_manager(pool: Any, sinks: int, bound: int | None = None) -> Any:
    """A manager of the kept group over a real block pool, not attached to requests yet."""
    import torch

    from vllm_sepllm.engine.scheduling.kept_manager import KeptManager
    from vllm_sepllm.engine.scheduling.spec import KeptSpec

    spec = KeptSpec(
        block_size=pool.hash_block_size,
        num_kv_heads=1,
        head_size=8,
        dtype=torch.float32,
        window_size=8,
        num_sink_tokens=sinks,
        planned_share=0.25,
        max_separator_tokens=bound,
    )
    return KeptManager(
        spec,
        block_pool=pool,
        enable_caching=pool.enable_caching,
        kv_cache_group_id=1,
        scheduler_block_size=pool.hash_block_size,
    )
