# SPDX-License-Identifier: Apache-2.0
"""The host tier as the policy `hybrid_aware` uses it: what is stored there, and what is found.

vLLM's `OffloadingConnector` stores blocks that requests have computed, and loads them when a later
prompt needs them. `HostTier` makes it store and find the checkpoints of `hybrid_policy`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferJob
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
    OffloadingConnectorScheduler,
    RequestOffloadState,
    TransferJobStatus,
)
from vllm.utils.math_utils import round_down
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LookupResult, OffloadKey, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from vllm_hybrid_kv.coordinator.hybrid_policy import HybridAwareCoordinator


class HostTier:
    """Connects the scheduler's side of an `OffloadingConnector` with a coordinator.

    **What is stored.** vLLM stores whole attention blocks, and the states that the coordinator
    hands over: those of pinned checkpoints. `answer_jobs` adds the states at the ends of answers.

    **What is found.** A request can resume at a length if the tier holds the state after exactly
    that many tokens and all attention blocks up to there. vLLM finds such a length only within one
    block after a block boundary whose state is stored too. `lookup` finds all of them.
    """

    def __init__(
        self, scheduler: OffloadingConnectorScheduler, coordinator: HybridAwareCoordinator
    ) -> None:
        self._scheduler = scheduler
        self._coordinator = coordinator
        groups = scheduler.config.kv_group_configs
        self._states = [group for group in groups if group.requires_cow_source]
        self._attention = [group for group in groups if not group.requires_cow_source]
        self._unit: int = scheduler.config.tokens_per_hash
        self._block: int = scheduler._partial_tail_block_size
        self._has_tiers = type(scheduler.manager) is TieringOffloadingManager
        coordinator.collects_answers = True

    @staticmethod
    def suits(scheduler: OffloadingConnectorScheduler, coordinator: object) -> bool:
        """Whether the connector can store states inside blocks, and the policy has checkpoints."""
        return (
            isinstance(coordinator, HybridAwareCoordinator)
            and scheduler.config.supports_partial_tail
            and not any(group.is_eagle_group for group in scheduler.config.kv_group_configs)
            and type(scheduler.manager) in (CPUOffloadingManager, TieringOffloadingManager)
        )

    def lookup(self, status: RequestOffloadState, max_num_new_tokens: int | None) -> int | None:
        """Find how many tokens after the local hit the tier can serve.

        Args:
            status: The connector's state of a request. If the hit ends inside a block, its
                `partial_tail_boundary` is set to the end of the hit in tokens.
            max_num_new_tokens: An upper bound of the result.

        Returns:
            The tokens, or None if the request should wait, because another request loads the same
            blocks, because the only hit is still being stored, or because a tier behind host
            memory has not answered yet or is being read.
        """
        request, local = status.req, status.num_locally_computed_tokens
        status.partial_tail_boundary = None
        limits = [request.num_tokens - 1, len(request.block_hashes) * self._unit]
        limits += [
            local + bound
            for bound in (max_num_new_tokens, status.max_load_tokens)
            if bound is not None
        ]
        # The attention blocks from the end of the local hit: how many are stored, and how many of
        # these can be read already.
        stored = readable = local // self._block
        while (stored + 1) * self._block <= min(limits):
            result = self._look_up(status, self._attention, (stored + 1) * self._block)
            if result is LookupResult.MISS:
                break
            if result is LookupResult.HIT and readable == stored:
                readable += 1
            stored += 1
        unknown = pending = False
        last = round_down(min(*limits, (stored + 1) * self._block - 1), self._unit)
        for boundary in range(last, local, -self._unit):
            results = {self._look_up(status, self._states, boundary)}
            if LookupResult.MISS not in results and boundary % self._block:
                results.add(self._look_up(status, self._attention, boundary))
            if LookupResult.MISS in results:
                continue
            if LookupResult.RETRY in results:
                # Ask for all boundaries before waiting for the answers.
                unknown = True
                continue
            if unknown or self._is_loading(request, local, boundary):
                return None
            if LookupResult.HIT_PENDING not in results and boundary // self._block <= readable:
                if boundary % self._block:
                    status.partial_tail_boundary = boundary
                return boundary - local
            if self._has_tiers:
                # The lookups began to read the blocks of this hit into host memory. Read no others.
                return None
            pending = True
        return None if unknown or pending else 0

    def answer_jobs(self) -> dict[int, TransferJob]:
        """Make the transfers that store the states at the ends of answers, by job id."""
        jobs = {}
        for request, tokens in self._coordinator.take_finished_answers():
            status = self._scheduler._req_status.get(request.request_id)
            job = status and self._answer_job(status, tokens)
            if job:
                jobs.update(job)
        return jobs

    def _answer_job(self, status: RequestOffloadState, tokens: int) -> dict[int, TransferJob]:
        scheduler, request = self._scheduler, status.req
        groups = scheduler.config.kv_group_configs
        inside = bool(tokens % self._block)
        sources = {}
        for index, group in enumerate(groups):
            if group.requires_cow_source or inside:
                block = self._coordinator.block_pool.get_cached_block(
                    request.block_hashes[tokens // self._unit - 1], [group.group_idx]
                )
                if block is None:
                    # It was evicted since the request ended.
                    return {}
                key = scheduler._make_boundary_key(
                    request, group.group_idx, tokens, status.req_context
                )
                sources[key] = index, block[0].block_id
        output = scheduler.manager.prepare_store(list(sources), status.req_context)
        if output is None or not output.keys_to_store:
            return {}
        stored = [sources[key] for key in output.keys_to_store]
        blocks = [block for _, block in stored]
        sizes, indices = [0] * len(groups), [0] * len(groups)
        for index, _ in stored:
            sizes[index], indices[index] = 1, -(-tokens // self._block) - 1
        job = scheduler._generate_job_id()
        status.transfer_jobs.add(job)
        # If a block is allocated again before it is stored, vLLM makes the step wait for the copy.
        for block in blocks:
            scheduler._block_id_to_pending_jobs.setdefault(block, set()).add(job)
        scheduler._jobs[job] = TransferJobStatus(
            req_id=request.request_id,
            pending_count=scheduler.config.num_workers,
            keys=set(output.keys_to_store),
            is_store=True,
            fenced_block_ids=blocks,
        )
        source = GPULoadStoreSpec(blocks, group_sizes=sizes, block_indices=indices)
        return {job: TransferJob(request.request_id, source, output.store_spec)}

    def _look_up(
        self, status: RequestOffloadState, groups: list[GroupOffloadConfig], tokens: int
    ) -> LookupResult:
        """Look up the blocks of some groups that end at a length, which may be inside a block."""
        results = LookupResult.HIT
        for key in self._keys(status.req, groups, tokens):
            result = self._scheduler.manager.lookup(key, status.req_context)
            if result is LookupResult.MISS:
                return result
            if result is not LookupResult.HIT:
                results = result
        return results

    def _is_loading(self, request: Request, local: int, tokens: int) -> bool:
        """Whether another request loads a block that a hit of `tokens` tokens would load."""
        loading = self._scheduler._chunks_being_loaded
        if not loading:
            return False
        wanted = list(self._keys(request, self._states, tokens))
        first = local // self._block + 1
        for end in [*range(first * self._block, tokens, self._block), tokens]:
            wanted += self._keys(request, self._attention, end)
        return not loading.isdisjoint(wanted)

    def _keys(
        self, request: Request, groups: list[GroupOffloadConfig], tokens: int
    ) -> Iterator[OffloadKey]:
        key = request.block_hashes[tokens // self._unit - 1]
        return (make_offload_key(key, group.group_idx) for group in groups)
