# SPDX-License-Identifier: Apache-2.0
"""Replay a trace through vLLM's scheduler and count its prefix-cache hits.

The KV cache is planned for vLLM's model runner V2. The scheduler is configured for model runner V1,
because it is created outside of `described_gpu`. That is harmless: the runners differ in what the
scheduler sends to workers, not in lookups and evictions.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import (
    KVCacheBlock,
    get_group_id,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_hybrid_kv.tools.output import ToolError
from vllm_hybrid_kv.tools.plan.engine import Engine
from vllm_hybrid_kv.tools.replay.host_memory import HostMemory
from vllm_hybrid_kv.tools.replay.trace import Conversations, TracedRequest

MOST_IDLE_STEPS = 100
"""A replay stops if more than this many steps in a row schedule no token."""


@dataclass
class Tally:
    """The counters of a replay.

    Attributes:
        requests: Finished requests.
        prompt_tokens: Prompt tokens of the finished requests.
        hit_tokens: Prompt tokens that the first lookup of a request found in the cache.
        host_hit_tokens: The part of `hit_tokens` that was loaded from host memory.
        loaded_bytes: Bytes copied from host memory to the KV cache.
        stored_bytes: Bytes copied from the KV cache to host memory.
        load_seconds: Virtual time of the copies from host memory.
        wait_seconds: Virtual time in which steps waited for copies whose blocks were needed.
        recomputed_tokens: Tokens that full attention had cached when their request started, but
            that were recomputed because another group lacked them.
        preemptions: How often the scheduler preempted a request.
        evicted_blocks: Evicted blocks by kind of KV group.
        steps: Steps of the scheduler.
        schedule_seconds: Seconds in the scheduler, by step.
        hits: Cached tokens by request, in the order of the trace.
    """

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    host_hit_tokens: int = 0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    load_seconds: float = 0.0
    wait_seconds: float = 0.0
    recomputed_tokens: int = 0
    preemptions: int = 0
    evicted_blocks: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    schedule_seconds: list[float] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens from the cache, from 0 to 1."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def step_ms(self) -> float:
        """The median time of a scheduler step, in milliseconds."""
        return 1000 * statistics.median(self.schedule_seconds or [0.0])

    @property
    def request_ms(self) -> float:
        """The scheduler's time per request, in milliseconds."""
        return 1000 * sum(self.schedule_seconds) / self.requests


class Replay:
    """One replay of a trace with a fixed number of requests in flight.

    Args:
        engine: An engine that no other replay has used.
        requests: The trace.
        concurrency: Requests in flight; the next is sent when one finishes.
        host: The host memory of the engine, if its configuration has an OffloadingConnector.

    Raises:
        ToolError: A request is longer than `max_model_len`.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[TracedRequest],
        concurrency: int,
        host: HostMemory | None = None,
    ) -> None:
        longest = engine.vllm_config.model_config.max_model_len
        for number, request in enumerate(requests, 1):
            tokens = request.input_length + request.output_length
            if tokens > longest:
                raise ToolError(
                    f"request {number} of the trace has {request.input_length:,} prompt tokens and "
                    f"{request.output_length:,} answer tokens, more than --max-model-len "
                    f"{longest:,}; remove it from the trace or raise --max-model-len"
                )
        self._engine = engine
        self._requests = requests
        self._conversations = Conversations(requests)
        self._concurrency = concurrency
        self._host = host
        algorithm = engine.vllm_config.cache_config.prefix_caching_hash_algo
        hash_function = get_hash_fn_by_name(algorithm)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(engine.hash_block_size, hash_function)
        self._answers: dict[str, list[int]] = {}
        # For each request that has not started: the tokens that full attention alone could serve.
        self._attention_hits: dict[str, int] = {}
        self._live: dict[str, Request] = {}
        self._idle_steps = 0
        self.tally = Tally(hits=[0] * len(requests))
        self._coordinator = engine.scheduler.kv_cache_manager.coordinator
        # Seconds of this class's extra lookups, which are subtracted from the scheduler's time.
        self._lookup_seconds = 0.0
        self._count_evictions()
        self._measure_attention_hits()

    def run(self, finished: Callable[[int], None] | None = None) -> Tally:
        """Replay the whole trace and return its counters.

        After each step that finishes requests, `finished` gets the number of finished requests.

        Raises:
            ToolError: The scheduler never schedules the next request.
        """
        waiting = deque(range(len(self._requests)))
        scheduler = self._engine.scheduler
        while waiting or self._live:
            while waiting and len(self._live) < self._concurrency:
                self._send(waiting.popleft())
            before, own = self.tally.requests, self._lookup_seconds
            started = time.perf_counter()
            output = scheduler.schedule()
            spent = time.perf_counter() - started - (self._lookup_seconds - own)
            self._idle_steps = 0 if output.total_num_scheduled_tokens else self._idle_steps + 1
            if self._idle_steps > MOST_IDLE_STEPS:
                raise ToolError(self._state())
            result = self._answer(output)
            if self._host is not None:
                result.kv_connector_output = self._host.step(output)
            started = time.perf_counter()
            scheduler.update_from_output(output, result)
            self.tally.schedule_seconds.append(spent + time.perf_counter() - started)
            self.tally.steps += 1
            self._collect()
            if finished is not None and self.tally.requests > before:
                finished(self.tally.requests)
        if self._host is not None:
            self._host.record(self.tally)
        return self.tally

    def _state(self) -> str:
        """Return the message for a scheduler that is stuck: its state, and what to change."""
        scheduler, pool = self._engine.scheduler, self._coordinator.block_pool
        loading = [
            request
            for request in self._live.values()
            if request.status is RequestStatus.WAITING_FOR_REMOTE_KVS
        ]
        if loading:
            return (
                f"the scheduler scheduled nothing in {self._idle_steps} steps: {len(loading):,} "
                f"requests, the first of which is request {int(loading[0].request_id) + 1}, wait "
                "for blocks from host memory, and no copy is in flight that could end. This is a "
                "fault of the connector; replay without --host-memory, and report it"
            )
        head = next(iter([*scheduler.waiting, *scheduler.running]))
        blocks = [
            -(-head.num_tokens // group.kv_cache_spec.block_size)
            for group in self._engine.kv_cache_config.kv_cache_groups
        ]
        return (
            f"the scheduler scheduled nothing in {self._idle_steps} steps: waiting requests: "
            f"{len(scheduler.waiting):,}, running requests: {len(scheduler.running):,}, free "
            f"blocks: {pool.get_num_free_blocks():,} of {pool.num_gpu_blocks:,}; request "
            f"{int(head.request_id) + 1} is first: its {head.num_tokens:,} tokens need "
            f"{' + '.join(f'{count:,}' for count in blocks)} blocks. Replay with more --memory or "
            "a smaller --concurrency"
        )

    def _send(self, index: int) -> None:
        prompt, answer = self._conversations.tokens(index)
        request = Request(
            request_id=str(index),
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                max_tokens=len(answer), ignore_eos=True, temperature=0.0
            ),
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self._answers[request.request_id] = answer
        self._live[request.request_id] = request
        self._attention_hits[request.request_id] = 0
        self._engine.scheduler.add_request(request)

    def _measure_attention_hits(self) -> None:
        """Wrap the scheduler's lookup to record the hit of full attention alone."""
        coordinator = self._coordinator
        if not isinstance(coordinator, HybridKVCacheCoordinator):
            return
        full = coordinator.full_attention_group_id
        groups = [lookup for lookup in coordinator.attention_groups if full in lookup.group_ids]
        if not groups:
            return
        lookup = groups[0]
        attention = coordinator.single_type_managers[lookup.group_ids[0]]
        manager = self._engine.scheduler.kv_cache_manager
        look_up = manager.get_computed_blocks

        # vLLM 0.33 may also pass the maximum length of the hit.
        def measured(request: Request, *limit: int) -> Any:
            if request.request_id in self._attention_hits:
                started = time.perf_counter()
                # The coordinator's lookup of all groups also returns this hit, but would take a
                # quarter of the replay's time, because it checks every match unit for a state.
                _, hit = lookup.manager_cls.find_longest_cache_hit(
                    block_hashes=request.block_hashes,
                    max_length=request.num_tokens - 1,
                    kv_cache_group_ids=lookup.group_ids,
                    block_pool=attention.block_pool,
                    kv_cache_spec=lookup.spec,
                    drop_eagle_block=False,
                    alignment_tokens=coordinator._cache_hit_alignment_tokens,
                    dcp_world_size=attention.dcp_world_size,
                    pcp_world_size=attention.pcp_world_size,
                )
                self._attention_hits[request.request_id] = hit
                self._lookup_seconds += time.perf_counter() - started
            return look_up(request, *limit)

        manager.get_computed_blocks = measured

    def _count_evictions(self) -> None:
        pool = self._coordinator.block_pool
        evict = pool._maybe_evict_cached_block
        kinds = [
            get_kv_cache_spec_kind(group.kv_cache_spec).value
            for group in self._engine.kv_cache_config.kv_cache_groups
        ]

        def counted(block: KVCacheBlock) -> bool:
            if block.block_hash is not None:
                self.tally.evicted_blocks[kinds[get_group_id(block.block_hash)]] += 1
            evicted: bool = evict(block)
            return evicted

        pool._maybe_evict_cached_block = counted

    def _answer(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Return the output that a model would return for the step."""
        names = list(output.num_scheduled_tokens)
        for new in output.scheduled_new_reqs:
            self.tally.hits[int(new.req_id)] = new.num_computed_tokens
            stats = self._live[new.req_id].prefill_stats
            assert stats is not None
            self.tally.host_hit_tokens += stats.num_external_cached_tokens
            hit = self._attention_hits.pop(new.req_id)
            self.tally.recomputed_tokens += max(hit - new.num_computed_tokens, 0)
        sampled: list[list[int]] = [[] for _ in names]
        for tokens, name in zip(sampled, names, strict=True):
            request = self._live[name]
            # `num_computed_tokens` includes this step already.
            if request.num_computed_tokens >= request.num_tokens:
                tokens.append(self._answers[name][request.num_output_tokens])
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
        )

    def _collect(self) -> None:
        for name in [name for name, request in self._live.items() if request.is_finished()]:
            request = self._live.pop(name)
            del self._answers[name]
            index = int(name)
            self.tally.requests += 1
            self.tally.prompt_tokens += self._requests[index].input_length
            self.tally.hit_tokens += self.tally.hits[index]
            self.tally.preemptions += request.num_preemptions
