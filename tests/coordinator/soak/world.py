# SPDX-License-Identifier: Apache-2.0
"""Run one world: vLLM's scheduler with a random model, cache and requests."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any
from unittest import mock

from vllm.distributed.kv_events import KVCacheEvent
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from testing.coordinator.events import EventReplay
from tests.coordinator.soak import checks
from tests.coordinator.soak.connector import Load, SoakConnector, Transfer
from tests.coordinator.soak.engine import make_scheduler
from tests.coordinator.soak.offloading import Copies, OffloadingWorkerSide
from tests.coordinator.soak.plans import offloading_plan, random_plan
from tests.coordinator.soak.prefixes import Prefixes
from tests.coordinator.soak.worker import Worker
from vllm_hybrid_kv.coordinator import decode_snapshots, hybrid_policy

STOP_TOKEN = 1
REMEMBERED = 40
"""How many past sequences a world keeps, so that later requests can extend or share them."""


@dataclass
class Step:
    """A scheduled step that has not run yet, with its block tables and synchronous loads.

    The tables are indexed by request, then by group. Null blocks are 0.
    """

    output: SchedulerOutput
    tables: dict[str, list[list[int]]]
    loads: list[Load]


class World:
    """One world with a random plan. `tally` counts its events."""

    def __init__(self, seed: str, strategy: str | None = None, offload: bool = False) -> None:
        """Make a world from a seed, by default with a random strategy.

        With `offload`, it has vLLM's OffloadingConnector, and the strategy is `hybrid_aware`.
        """
        self._draw = random.Random(seed)
        if offload:
            plan = offloading_plan(self._draw)
        else:
            plan = random_plan(self._draw, strategy)
            plan = plan.with_smaller_attention(random.Random(f"{seed} smaller attention"))
            plan = plan.with_checkpoints(random.Random(f"{seed} checkpoints"))
        self.plan = plan = plan.with_retention(random.Random(f"{seed} retention"))
        # Copy states more often than in production, because answers and pools are small.
        with (
            mock.patch.multiple(
                decode_snapshots,
                INTERVAL=self._draw.choice((1, 8, decode_snapshots.INTERVAL)),
                MAX_SHARE=self._draw.choice((1, 4, decode_snapshots.MAX_SHARE)),
            ),
            mock.patch.object(
                # Most pools have fewer than 16 blocks per request, so keep a larger share clean.
                hybrid_policy,
                "CLEAN_SHARE",
                random.Random(f"{seed} clean").choice((1, 2, 4)),
            ),
        ):
            self._scheduler = make_scheduler(plan)
        self._pool = self._scheduler.kv_cache_manager.block_pool
        self._hasher = get_request_block_hasher(plan.unit, sha256)
        self._replay = EventReplay(plan.unit)
        self._events: list[KVCacheEvent] = []
        self._scheduler.kv_event_publisher.publish = lambda batch: self._events.extend(batch.events)
        self._prefixes = Prefixes()
        coordinator = self._scheduler.kv_cache_manager.coordinator
        alignment = plan.scheduler_block_size
        if isinstance(coordinator, HybridKVCacheCoordinator):
            alignment = coordinator._cache_hit_alignment_tokens
        self.tally: Counter[str] = Counter()
        worker_draw = random.Random(f"{seed} worker")
        self._worker = Worker(plan, self._prefixes, worker_draw, alignment, self.tally)
        self._contents = checks.Contents(self._pool, plan, self._worker, self._prefixes)
        self._connector: SoakConnector | None = None
        self._offloading: OffloadingWorkerSide | None = None
        if offload:
            copies = Copies(self._worker, random.Random(f"{seed} copies"), self.tally)
            self._offloading = OffloadingWorkerSide(
                self._scheduler.vllm_config, plan.kv_cache_config, copies
            )
        else:
            self._connector = self._scheduler.connector
        if self._connector is not None:
            self._connector.draw = random.Random(f"{seed} connector")
            self._connector.alignment = plan.scheduler_block_size
            self._connector.diverges = plan.may_diverge and self._draw.random() < 0.5
        self._single = len(plan.groups) == 1
        self._busy = self._draw.uniform(0.5, 3) * plan.max_num_seqs
        self._offers = self._draw.choice((0.2, 0.6))
        self._failures = self._draw.choice((0.2, 0.6))
        self._turns = self._draw.choice((2, 8, 20))
        self._longest_answer = self._draw.choice((4, 12, 40))
        self._histories: list[list[int]] = []
        self._system = self._tokens(self._draw.randrange(1, plan.max_model_len // 3))
        self._live: dict[str, tuple[Request, list[int]]] = {}
        self._meaning: dict[Any, tuple[int, int]] = {}
        self._hashes: dict[Any, list[Any]] = {}
        self._steps: deque[Step] = deque()
        self._transfers: list[Transfer] = []
        self._loaded: list[str] = []
        self._lost: set[int] = set()
        self._unhittable: set[Any] = set()
        self._names = itertools.count()
        self._idle = 0
        self._count_evictions()

    def run(self, steps: int) -> None:
        """Run some steps, then end all requests and check that nothing is left."""
        for _ in range(steps):
            self._happen()
            self.step()
        while self._scheduler.has_requests() or self._steps or self._transfers:
            if self._draw.random() < 0.1:
                self._abort(list(self._live))
            self.step()
        free = self._pool.get_num_free_blocks()
        checks.require(free == self.plan.num_blocks - 1, "all is done and only", free, "are free")
        checks.require(self._scheduler.reset_prefix_cache(), "an idle cache cannot be emptied")
        self.check()

    def _happen(self) -> None:
        draw = self._draw
        if len(self._live) < self._busy and draw.random() < 0.5:
            for _ in range(draw.choice((1, 1, 2, 3))):
                self._arrive()
        chance = draw.random()
        if chance < 0.03:
            live = list(self._live)
            self._abort(draw.sample(live, min(len(live), draw.choice((1, 1, 3)))))
        elif chance < 0.035:
            self._reset(running=True)
        elif chance < 0.045:
            self._reset(running=False)
        elif chance < 0.055:
            self._evict()

    def _tokens(self, count: int) -> list[int]:
        return [self._draw.randrange(self.plan.vocabulary) for _ in range(count)]

    def _prompt(self, longest: int) -> list[int]:
        draw = self._draw
        new = self._tokens(draw.randint(1, self._turns))
        way = draw.random()
        if way < 0.15 or not self._histories:
            prompt = self._tokens(draw.randint(1, longest))
        elif way < 0.3:
            prompt = self._system + new
        else:
            history = draw.choice(self._histories)
            if self._live and draw.random() < 0.3:
                # Continue a running request, to hit its blocks while it still writes more.
                history = list(draw.choice(list(self._live.values()))[0].all_token_ids)
            if way < 0.65:
                prompt = history + new
            elif way < 0.9:
                prompt = history[: draw.randint(1, len(history))] + new
            else:
                prompt = list(history)
        return prompt[:longest]

    def _arrive(self) -> None:
        draw = self._draw
        answer = draw.randint(1, self._longest_answer)
        longest = self.plan.max_model_len - self.plan.draft_tokens - 2
        prompt = self._prompt(max(longest - draw.randint(0, answer), 1))
        request = Request(
            request_id=f"r{next(self._names)}",
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(
                max_tokens=answer,
                stop_token_ids=[STOP_TOKEN] if draw.random() < 0.3 else [],
                ignore_eos=True,
            ),
            pooling_params=None,
            block_hasher=self._hasher,
        )
        if self._connector is not None and draw.random() < self._offers:
            kinds = {"async": [True], "sync": [False], "both": [True, False]}
            tokens, is_async = draw.randint(1, len(prompt)), draw.choice(kinds[self.plan.connector])
            self._connector.offers[request.request_id] = tokens, is_async
        self._live[request.request_id] = (request, [])
        self._scheduler.add_request(request)
        self.tally["arrivals"] += 1

    def _abort(self, request_ids: list[str]) -> None:
        aborted = self._scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)
        self.tally["aborts"] += len(aborted)

    def _reset(self, running: bool) -> None:
        scheduler = self._scheduler
        before = len(scheduler.running)
        try:
            done = scheduler.reset_prefix_cache(reset_running_requests=running)
        except RuntimeError:
            # vLLM refuses a reset if anything except running requests holds blocks.
            checks.require(running, "a reset without `reset_running_requests` raised")
            self.tally["resets refused"] += 1
            return
        checks.require(not running or done, "the cache was not emptied")
        self.tally["resets" if done else "resets refused"] += 1
        self.tally["resets with requests running"] += bool(done and before)
        if done:
            self._lost.clear()
            checks.require(not checks.num_entries(self._pool), "the cache was not emptied")

    def _evict(self) -> None:
        """Evict some blocks, as vLLM does after a connector's failure."""
        cached = [block.block_id for block in self._pool.blocks if block.block_hash is not None]
        chosen = set(self._draw.sample(cached, min(len(cached), self._draw.choice((1, 3, 8)))))
        self._scheduler.kv_cache_manager.evict_blocks(chosen)
        self._lost |= chosen
        self.tally["hashes taken by evict_blocks"] += len(chosen)

    def _count_evictions(self) -> None:
        evict = self._pool._maybe_evict_cached_block

        def counted_evict(block: Any) -> bool:
            self._lost.discard(block.block_id)
            evicted: bool = evict(block)
            self.tally["evictions"] += evicted
            return evicted

        self._pool._maybe_evict_cached_block = counted_evict

    def step(self) -> None:
        """Schedule a step, and run the scheduled steps that are due."""
        output = self._scheduler.schedule()
        self.tally["steps"] += 1
        self._steps.append(Step(output, self._tables(output), self._take_loads()))
        checks.check_references(self._scheduler)
        self._watch_progress(output)
        late = self.plan.lag and output.total_num_scheduled_tokens and self._draw.random() < 0.9
        while len(self._steps) > (self.plan.lag if late else 0):
            self._finish_step(self._steps.popleft())
            self.check()
        if not self._steps:
            self._contents.check(self._meaning)

    def _tables(self, output: SchedulerOutput) -> dict[str, list[list[int]]]:
        manager = self._scheduler.kv_cache_manager
        return {
            request_id: [list(ids) for ids in manager.get_block_ids(request_id)]
            for request_id in output.num_scheduled_tokens
        }

    def _take_loads(self) -> list[Load]:
        if self._connector is None:
            return []
        started, self._connector.started = self._connector.started, []
        for load in started:
            if load.is_async:
                fails = self._draw.random() < self._failures
                wait = self._draw.randint(0, 6)
                self._transfers.append(Transfer(load.request, wait, load, fails))
                self.tally["async loads"] += 1
            else:
                self.tally["sync loads"] += 1
        ended, self._connector.kept_after_end = self._connector.kept_after_end, []
        for request_id in ended:
            request, _ = self._live[request_id]
            self._transfers.append(Transfer(request, self._draw.randint(0, 8)))
            self.tally["blocks held after the end"] += 1
        return [load for load in started if not load.is_async]

    def _watch_progress(self, output: SchedulerOutput) -> None:
        waits = self._steps[0].output.total_num_scheduled_tokens or self._transfers
        if self._offloading is not None:
            waits = waits or self._scheduler.connector.has_pending_push_work()
        if output.total_num_scheduled_tokens or waits or not self._scheduler.requests:
            self._idle = 0
            return
        self._idle += 1
        if self._idle < 50:
            return
        # Loaded requests hold blocks while they wait for more blocks. vLLM preempts only running
        # requests, so loaded ones can wait for each other forever. Abort one of them.
        loaded = [r for r in self._scheduler.requests.values() if r.num_computed_tokens]
        stuck = len(loaded) > 1 and not self._scheduler.running
        checks.require(stuck, "nothing moves:", dict(self._scheduler.requests))
        self._abort([loaded[-1].request_id])
        self.tally["standstills of loaded requests"] += 1

    def _finish_step(self, step: Step) -> None:
        worker, output = self._worker, step.output
        worker.receive(output, self.plan.lag)
        for request_id, tables in step.tables.items():
            for group, table in enumerate(tables):
                known = worker.sequences[request_id].tables[group]
                checks.require(
                    len(known) >= len(table)
                    and all(b in (0, a) for a, b in zip(known, table, strict=False)),
                    f"{request_id}: the worker knows {known}, the scheduler has {table}",
                )
        for load in step.loads:
            worker.load(load, failed=False)
        if self._offloading is not None:
            self._offloading.before(output)
        sampled = worker.run(output)
        report = self._transferred()
        if self._offloading is not None:
            report = self._offloading.after(output)
        names = list(output.num_scheduled_tokens)
        self._scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=sampled,
                kv_connector_output=report,
            ),
        )
        if self._connector is not None:
            self._connector.loading.difference_update(self._loaded)
        self._loaded.clear()
        self._collect()
        self._propose(names)

    def _transferred(self) -> KVConnectorOutput | None:
        if self._connector is None:
            return None
        report = KVConnectorOutput(finished_sending=set(), finished_recving=set())
        still: list[Transfer] = []
        for transfer in self._transfers:
            transfer.steps -= 1
            name = transfer.request.request_id
            if transfer.steps >= 0:
                still.append(transfer)
            elif transfer.load is None:
                report.finished_sending.add(name)
            else:
                self._worker.load(transfer.load, transfer.fails)
                report.finished_recving.add(name)
                self._loaded.append(name)
                if transfer.fails:
                    self._report_failure(transfer.load, report)
        self._transfers = still
        return report

    def _report_failure(self, load: Load, report: KVConnectorOutput) -> None:
        name = load.request.request_id
        self.tally["failed loads"] += 1
        # Offer nothing next time, so that this engine computes the request.
        self._connector.offers.pop(name, None)
        if self._single:
            report.invalid_block_ids.update(
                block for block in load.tables[0][load.start // self.plan.block_size :] if block
            )
        else:
            # vLLM accepts ids of failed blocks only from models with one KV group.
            report.failed_recving.add(name)

    def _collect(self) -> None:
        self._learn_hashes()
        for name, (request, _) in list(self._live.items()):
            if name not in self._scheduler.requests:
                del self._live[name]
                self.tally["preemptions"] += request.num_preemptions
                self._histories.append(list(request.all_token_ids))
        del self._histories[:-REMEMBERED]

    def _propose(self, names: list[str]) -> None:
        if self.plan.draft_tokens and not self.plan.lag:
            drafts = [self._tokens(self._draw.randint(0, self.plan.draft_tokens)) for _ in names]
            self._scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))

    def check(self) -> None:
        """Check everything that must be consistent between two calls of the scheduler."""
        self._learn_hashes()
        checks.check_references(self._scheduler)
        checks.check_hash_map(self._pool)
        checks.check_events(self._scheduler, self._replay, self._events)
        checks.check_policy(self._scheduler, self._lost, self._hashes, self._unhittable)

    def _learn_hashes(self) -> None:
        """Record which prefix each hash of a request stands for."""
        unit = self.plan.unit
        for request, numbers in self._live.values():
            known = len(numbers) // unit
            self._prefixes.extend(numbers, request.all_token_ids)
            for place in range(known, len(request.block_hashes)):
                end = (place + 1) * unit
                self._meaning[request.block_hashes[place]] = (numbers[end - 1], end)
                self._hashes[request.block_hashes[place]] = request.block_hashes
            self._replay.learn(request.block_hashes[known:])
