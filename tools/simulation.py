"""vLLM's scheduler and block managers with a model of the worker, without a neural network.

A page of the modelled worker holds, in each slot, the identity of what was written there: a hash
of all tokens up to and including its own. So a query that reads a wrong, stale or missing entry
is noticed at once, whoever wrote it. The next token is a function of that identity, as in greedy
decoding, so a request's answer depends on its prompt alone.

With ``asynchronous=True`` steps are scheduled before the outcome of the step before is known, as
vLLM does on GPUs: sampled tokens are placeholders to the scheduler until then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import MODEL, check_integrity
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.core.kv_cache_utils import (
    generate_scheduler_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_sepllm.engine.compat import kv_cache_configs
from vllm_sepllm.engine.scheduling.kept_manager import KeptManager
from vllm_sepllm.engine.scheduling.pool_state import PoolState
from vllm_sepllm.engine.scheduling.scheduler import SepLLMAsyncScheduler
from vllm_sepllm.engine.scheduling.spec import KeptSpec, WindowSpec, kept_spec, window_spec
from vllm_sepllm.engine.startup.settings import Settings

HEADS = {"num_kv_heads": 4, "head_size": 32, "dtype": torch.bfloat16}
NextToken = Callable[[str, int, int], int]


def identity(before: int, token: int) -> int:
    """Identity of a prefix that ends with ``token`` and otherwise is ``before``."""
    return hash((before, token))


@dataclass
class WorkerRequest:
    """What a worker knows of a request."""

    token_ids: list[int]
    blocks: list[list[int]]
    computed: int
    identities: list[int] = field(default_factory=list)

    def identify(self) -> None:
        """Extend ``identities`` to all tokens."""
        for token in self.token_ids[len(self.identities) :]:
            self.identities.append(identity(self.identities[-1] if self.identities else 0, token))

    def truncate(self, num_tokens: int) -> None:
        del self.token_ids[num_tokens:]
        del self.identities[num_tokens:]


class Worker:
    """Pages and requests of the modelled worker."""

    def __init__(self, simulation: Simulation, next_token: NextToken) -> None:
        self.simulation, self.next_token = simulation, next_token
        self.pages: dict[int, dict[int, int]] = {}
        self.requests: dict[str, WorkerRequest] = {}
        self.drafts: dict[str, list[int]] = {}

    def execute(self, output: Any) -> ModelRunnerOutput:
        """One step: update requests, copy pages, write, check what is read, sample."""
        for name in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
            self.requests.pop(name, None)
        for new in output.scheduled_new_reqs:
            ids = new.prefill_token_ids or new.prompt_token_ids
            blocks = [list(group) for group in new.block_ids]
            self.requests[new.req_id] = WorkerRequest(list(ids), blocks, new.num_computed_tokens)
        # The V2 runner has no more rows, and ends the engine.
        most = self.simulation.config.scheduler_config.max_num_seqs
        assert self.simulation.rule is None or len(self.requests) <= most, "no free row"
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            self._continue(name, cached, i)
        for source, copy in output.kv_cache_block_copies or ():
            self.pages[copy] = dict(self.pages.get(source, {}))
        sampled = {
            name: self._run(name, count, output.scheduled_spec_decode_tokens.get(name, []))
            for name, count in output.num_scheduled_tokens.items()
        }
        return ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={name: i for i, name in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
        )

    def _continue(self, name: str, cached: Any, i: int) -> None:
        new_blocks = cached.new_block_ids[i]
        if name in cached.resumed_req_ids:
            request = self.simulation.scheduler.requests[name]
            blocks = [list(group) for group in new_blocks]
            computed = cached.num_computed_tokens[i]
            self.requests[name] = WorkerRequest(list(request.all_token_ids), blocks, computed)
            return
        request = self.requests[name]
        for held, added in zip(request.blocks, new_blocks or (), strict=False):
            held.extend(added)
        if not self.simulation.asynchronous:
            assert request.computed == cached.num_computed_tokens[i]

    def _run(self, name: str, count: int, drafts: list[int]) -> list[int]:
        request = self.requests[name]
        start, stop = request.computed, request.computed + count
        if self.simulation.asynchronous and drafts:
            # A request that has just been resumed has none yet: whatever is there is rejected.
            proposed = self.drafts.pop(name, [])
            drafts = (proposed + [0] * len(drafts))[: len(drafts)]
        known = len(request.token_ids)
        request.token_ids.extend(drafts)
        request.identify()
        assert stop <= len(request.token_ids), "tokens to compute that nobody knows"
        self._write(request, start, stop)
        for position in {start, (start + stop) // 2, stop - 1}:
            self._read(name, request, position)
        request.computed = stop
        if stop < known:
            return []
        return self._sample(name, request, known, drafts)

    def _sample(
        self, name: str, request: WorkerRequest, known: int, drafts: list[int]
    ) -> list[int]:
        """The next token and the drafts that agree; rejected ones were never computed."""
        sampled = []
        for i in range(len(drafts) + 1):
            position = known + i
            token = self.next_token(name, position, request.identities[position - 1])
            sampled.append(token)
            if i == len(drafts) or drafts[i] != token:
                break
        request.truncate(known)
        request.token_ids.extend(sampled)
        request.identify()
        request.computed = known + len(sampled) - 1
        return sampled

    def _write(self, request: WorkerRequest, start: int, stop: int) -> None:
        size, policy = self.simulation.block_size, self.simulation.rule
        blocks, groups = request.blocks, self.simulation.groups
        for group in groups[FullAttentionSpec] + groups[WindowSpec]:
            for position in range(start, stop):
                page = self.pages.setdefault(blocks[group][position // size], {})
                page[position % size] = request.identities[position]
        if policy is None:
            return
        flags = policy.kept_flags(request.token_ids[:stop])
        first = int(flags[:start].sum())
        kept = start + flags[start:stop].nonzero()[0]
        for group in groups[KeptSpec]:
            for entry, position in enumerate(kept.tolist(), first):
                page = self.pages.setdefault(blocks[group][entry // size], {})
                page[entry % size] = request.identities[position]

    def _read(self, name: str, request: WorkerRequest, position: int) -> None:
        policy, groups = self.simulation.rule, self.simulation.groups
        for group in groups[FullAttentionSpec]:
            self._read_positions(name, request, group, 0, position)
        if policy is None:
            return
        first = int(policy.window_start(position))
        for group in groups[WindowSpec]:
            self._read_positions(name, request, group, first, position)
        for group in groups[KeptSpec]:
            self._read_stream(name, request, group, first)

    def _read_positions(
        self, name: str, request: WorkerRequest, group: int, first: int, position: int
    ) -> None:
        size = self.simulation.block_size
        for seen in range(first, position + 1):
            found = self.pages[request.blocks[group][seen // size]][seen % size]
            assert found == request.identities[seen], f"{name} at {position}: wrong at {seen}"

    def _read_stream(self, name: str, request: WorkerRequest, group: int, before: int) -> None:
        size, policy = self.simulation.block_size, self.simulation.rule
        assert policy is not None
        kept = policy.kept_flags(request.token_ids[:before]).nonzero()[0].tolist()
        bound = len(kept) if policy.max_separator_tokens is None else policy.max_separator_tokens
        for entry, seen in enumerate(kept):
            if policy.num_sink_tokens <= entry < len(kept) - bound:
                continue
            found = self.pages[request.blocks[group][entry // size]][entry % size]
            assert found == request.identities[seen], f"{name} before {before}: entry {entry}"


class Simulation:
    """A scheduler, its managers and the worker's model.

    Args:
        sepllm: SepLLM options, ``None`` for vLLM's own full attention.
        next_token: the token after a prefix, from request id, position and identity.
        num_blocks: KV-cache blocks; or
        memory_bytes: what vLLM is to cut them from.
        num_layers: layers under SepLLM attention, or without options under full attention.
        num_dense: layers with full attention beside them. One of them gives every layer a window
            group and a kept group of its own.
        propose: draft tokens for a request, from its id and tokens; ``None``: no drafts.
        asynchronous: schedule one step ahead.
        options: further arguments of vLLM's engine.
    """

    def __init__(
        self,
        sepllm: dict[str, Any] | None,
        next_token: NextToken,
        *,
        num_blocks: int | None = None,
        memory_bytes: int = 2**24,
        num_layers: int = 1,
        num_dense: int = 0,
        propose: Callable[[str, list[int]], list[int]] | None = None,
        asynchronous: bool = False,
        **options: Any,
    ) -> None:
        defaults = {"max_model_len": 512, "max_num_batched_tokens": 64, "max_num_seqs": 8}
        if sepllm is not None:
            defaults |= {
                "attention_backend": "sepllm",
                "additional_config": {"sepllm": sepllm},
            }
        config = EngineArgs(
            MODEL, num_gpu_blocks_override=num_blocks, **{**defaults, **options}
        ).create_engine_config()
        self.block_size = config.cache_config.block_size
        self.asynchronous, self.propose = asynchronous, propose
        self.rule = None if sepllm is None else Settings.of(config).rule
        layout = CPUAttentionBackend.supported_kv_cache_layouts()[0]
        config.cache_config.kv_cache_layout = layout.name
        specs = self._specs(config, num_layers, num_dense)
        configs = kv_cache_configs(config, [specs], [memory_bytes])
        kv_cache_config = generate_scheduler_kv_cache_config(configs)
        config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
        self.kv_cache_config, self.config = kv_cache_config, config
        self.groups: dict[type, list[int]] = {FullAttentionSpec: [], WindowSpec: [], KeptSpec: []}
        for i, group in enumerate(kv_cache_config.kv_cache_groups):
            self.groups[type(group.kv_cache_spec)].append(i)
        self.scheduler = self._make_scheduler(config, kv_cache_config)
        self.managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.worker = Worker(self, next_token)
        self.answers: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.created: dict[str, int] = {}
        self._in_flight: list[tuple[Any, ModelRunnerOutput]] = []
        self._idle_steps = self._fruitless_steps = self._num_aborted = 0

    def _specs(self, config: Any, num_layers: int, num_dense: int) -> dict[str, Any]:
        common = {"block_size": self.block_size, **HEADS}
        if self.rule is None:
            return {f"layer{i}": FullAttentionSpec(**common) for i in range(num_layers)}
        dense = {f"dense{i}": FullAttentionSpec(**common) for i in range(num_dense)}
        settings, layer = Settings.of(config), FullAttentionSpec(**common)
        window, kept = window_spec(layer, settings), kept_spec(layer, settings)
        layers = range(num_layers)
        ours = {f"layer{i}": window for i in layers} | {f"layer{i}.kept": kept for i in layers}
        return dense | ours

    def _make_scheduler(self, config: Any, kv_cache_config: Any) -> Any:
        scheduler_class = config.scheduler_config.get_scheduler_cls()
        if self.asynchronous:
            scheduler_class = AsyncScheduler if self.rule is None else SepLLMAsyncScheduler
            config.scheduler_config.async_scheduling = True
        scheduler_size, hash_size = resolve_kv_cache_block_sizes(kv_cache_config, config)
        scheduler = scheduler_class(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=scheduler_size,
            hash_block_size=hash_size,
            log_stats=True,
        )
        if self.asynchronous:
            scheduler.use_v2_model_runner = True
        from vllm.utils.hashing import get_hash_fn_by_name

        hash_function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(hash_size, hash_function)
        return scheduler

    def add(self, name: str, prompt: list[int], max_tokens: int, **options: Any) -> Request:
        request = self._request(name, prompt, max_tokens, **options)
        self.answers[name] = []
        self.scheduler.add_request(request)
        return request

    def turn(self, name: str, prompt: list[int] | None, max_tokens: int) -> None:
        """The next turn of a session (a request added as resumable); ``None`` ends it."""
        resumable = prompt is not None
        self.scheduler.add_request(
            self._request(name, prompt or [0], max_tokens, resumable=resumable)
        )

    def _request(self, name: str, prompt: list[int], max_tokens: int, **options: Any) -> Request:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        params.update_from_generation_config({}, eos_token_id=None)
        return Request(name, list(prompt), params, None, block_hasher=self._hasher, **options)

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self._num_aborted += 1 + len(self.answers.pop(name, ()))

    def step(self) -> None:
        """Schedule and execute a step; take in the outcome of this one or of the one before."""
        before = self._achieved
        output = self.scheduler.schedule()
        self._in_flight.append((output, self.worker.execute(output)))
        if self.propose is not None:
            self._draft()
        if not self.asynchronous or len(self._in_flight) > 1:
            self._finish_step()
        self._check_progress(output, self._achieved > before)

    @property
    def _achieved(self) -> int:
        """Grows with every token sampled and every request that ends."""
        return sum(map(len, self.answers.values())) + len(self.finished) + self._num_aborted

    def _check_progress(self, output: Any, has_achieved: bool) -> None:
        """Nothing waits for ever.

        If nothing runs although something waits, the next step computes something or ends a
        request. And requests that preempt each other get somewhere in the end.
        """
        is_idle = not output.num_scheduled_tokens and not self.scheduler.running
        in_flight = any(earlier.num_scheduled_tokens for earlier, _ in self._in_flight)
        # vLLM starts nothing in a step in which it preempts.
        is_idle &= not (in_flight or has_achieved or output.preempted_req_ids)
        statuses = {request.status for request in self.scheduler.requests.values()}
        # A session keeps its pages while it waits for its user.
        is_idle &= RequestStatus.WAITING_FOR_STREAMING_REQ not in statuses
        waits = is_idle and bool(statuses & {RequestStatus.WAITING, RequestStatus.PREEMPTED})
        self._idle_steps = self._idle_steps + 1 if waits else 0
        assert self._idle_steps < 2, f"{self.live} wait, nothing runs"
        self._fruitless_steps = 0 if has_achieved else self._fruitless_steps + 1
        if RequestStatus.WAITING_FOR_STREAMING_REQ in statuses:
            self._fruitless_steps = 0
        tokens = sum(request.num_tokens for request in self.scheduler.requests.values())
        assert self._fruitless_steps < 20 + tokens, f"{self.live} get nowhere"

    def _draft(self) -> None:
        assert self.propose is not None
        requests = self.worker.requests
        drafts = {name: self.propose(name, r.token_ids) for name, r in requests.items()}
        self.worker.drafts = drafts
        if not self.asynchronous:
            # vLLM takes drafts after it has taken in the step's tokens.
            self._drafted = DraftTokenIds(list(drafts), list(drafts.values()))

    def _finish_step(self) -> None:
        output, result = self._in_flight.pop(0)
        outputs = self.scheduler.update_from_output(output, result)
        if self.propose is not None and not self.asynchronous:
            self.scheduler.update_draft_token_ids(self._drafted)
        for client in outputs.values():
            for item in client.outputs:
                if item.request_id in self.answers:
                    self.answers[item.request_id].extend(item.new_token_ids)
                    if item.prefill_stats is not None:
                        stats = item.prefill_stats
                        self.cached[item.request_id] = stats.num_cached_tokens
                        self.created[item.request_id] = stats.num_cache_creation_tokens
                    if item.finish_reason is not None:
                        self.finished[item.request_id] = str(item.finish_reason)
                        self.reasons[item.request_id] = str(item.stop_reason)

    def settle(self) -> None:
        """Run until nothing is left to do."""
        while self.scheduler.has_unfinished_requests() or self._in_flight:
            if self._in_flight and not self.scheduler.has_unfinished_requests():
                self._finish_step()
            else:
                self.step()

    @property
    def num_held(self) -> int:
        """Pages that are not free."""
        return int(self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks())

    @property
    def live(self) -> list[str]:
        return list(self.scheduler.requests)

    def check(self) -> None:
        """Integrity of the block pool, and of the number of stream pages each request holds."""
        if not self.scheduler.deferred_frees:
            check_integrity(self.managers, self.pool)
            assert PoolState.of(self.pool).tails.keys() <= self.scheduler.requests.keys()
        if self.rule is None:
            return
        ahead = (2 if self.asynchronous else 1) * (1 + self.scheduler.num_spec_tokens)
        for manager in self.managers:
            if isinstance(manager, KeptManager):
                for name, blocks in manager.req_to_blocks.items():
                    self._check_stream(name, len(blocks), ahead)
                    self._check_bound(name, sum(not block.is_null for block in blocks))

    def _check_bound(self, name: str, num_pages: int) -> None:
        """What a request holds follows from the bound, however long it is."""
        assert self.rule is not None
        if self.rule.max_separator_tokens is None:
            return
        recent = self.rule.window_size - 1 + self.config.max_in_flight_tokens
        entries = self.rule.max_separator_tokens + recent
        most = math.ceil(self.rule.num_sink_tokens / self.block_size)
        most += math.ceil(entries / self.block_size) + 1
        assert num_pages <= most, f"{name} holds {num_pages} pages, the bound allows {most}"

    def _check_stream(self, name: str, num_pages: int, ahead: int) -> None:
        assert self.rule is not None
        request, worker = self.scheduler.requests[name], self.worker.requests.get(name)
        ids = list(request.all_token_ids)
        most = int(self.rule.kept_flags(ids).sum()) + ahead
        assert num_pages <= math.ceil(most / self.block_size), f"{name} holds pages for nothing"
        if worker is not None and num_pages:
            computed = worker.token_ids[: worker.computed]
            least = int(self.rule.kept_flags(computed).sum())
            assert num_pages >= math.ceil(least / self.block_size), f"{name} lacks a page"
