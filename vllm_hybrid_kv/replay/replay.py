# SPDX-License-Identifier: Apache-2.0
"""Drives vLLM's scheduler with a trace, in place of the model and the clients."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_hybrid_kv.replay.trace import Conversations, TracedRequest

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_hybrid_kv.replay.engine import Engine


@dataclass
class Tally:
    """What a replay came to.

    Attributes:
        requests: Requests answered.
        prompt_tokens: Tokens of their prompts.
        hit_tokens: Those of them that came from the cache, at the first lookup.
        recomputed_tokens: Tokens computed again after a preemption.
        preemptions: How often a request was preempted.
        steps: Steps of the scheduler.
        schedule_seconds: Time in the scheduler, by step.
        hits: Cached tokens by request, in the order of the trace.
    """

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    schedule_seconds: list[float] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that came from the cache."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class Replay:
    """One replay of a trace: a closed loop of a fixed number of requests in flight."""

    def __init__(self, engine: Engine, requests: Sequence[TracedRequest], concurrency: int) -> None:
        """Prepare a replay.

        Args:
            engine: A fresh one.
            requests: The trace.
            concurrency: Requests in flight; the next one is sent as one is answered.
        """
        self._engine = engine
        self._requests = requests
        self._conversations = Conversations(requests)
        self._concurrency = concurrency
        hash_function = get_hash_fn_by_name(
            engine.vllm_config.cache_config.prefix_caching_hash_algo
        )
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(engine.hash_block_size, hash_function)
        self._answers: dict[str, list[int]] = {}
        self._live: dict[str, Request] = {}
        self.tally = Tally(hits=[0] * len(requests))

    def run(self, answered: Callable[[int], None] | None = None) -> Tally:
        """Replay the whole trace.

        Args:
            answered: Is told the number of requests answered after each step that answered some.

        Returns:
            What it came to.
        """
        waiting = deque(range(len(self._requests)))
        scheduler = self._engine.scheduler
        while waiting or self._live:
            while waiting and len(self._live) < self._concurrency:
                self._send(waiting.popleft())
            before = self.tally.requests
            started = time.perf_counter()
            output = scheduler.schedule()
            spent = time.perf_counter() - started
            result = self._answer(output)
            started = time.perf_counter()
            scheduler.update_from_output(output, result)
            self.tally.schedule_seconds.append(spent + time.perf_counter() - started)
            self.tally.steps += 1
            self._collect()
            if answered is not None and self.tally.requests > before:
                answered(self.tally.requests)
        return self.tally

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
        self._engine.scheduler.add_request(request)

    def _answer(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """Return what a model would have, had it computed the step."""
        names = list(output.num_scheduled_tokens)
        for new in output.scheduled_new_reqs:
            self.tally.hits[int(new.req_id)] = new.num_computed_tokens
        sampled: list[list[int]] = []
        for name in names:
            request = self._live[name]
            # `num_computed_tokens` counts this step already.
            if request.num_computed_tokens < request.num_tokens:
                sampled.append([])
            else:
                sampled.append([self._answers[name][request.num_output_tokens]])
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
