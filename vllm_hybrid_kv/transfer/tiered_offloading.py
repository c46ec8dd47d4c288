# SPDX-License-Identifier: Apache-2.0
"""The scheduler side of vLLM's OffloadingConnector for checkpoints in files and other tiers.

Tiers behind host memory may outlive the process and may be shared, so nothing tracks what they
hold: lookups ask for blocks by their hashes. See `checkpoint_offloading` for host memory alone.
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
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LookupResult, OffloadKey, make_offload_key
from vllm.v1.request import Request

from vllm_hybrid_kv.coordinator.hybrid_policy import HybridAwareCoordinator


class TieredOffloading(OffloadingConnectorScheduler):
    """Stores the states of pinned checkpoints, and finds the longest prefix that is stored.

    vLLM stores whole attention blocks, and the states that the coordinator hands over. This class
    adds the states at the ends of answers. A request can resume at a length if the state after
    exactly that many tokens and all attention blocks up to there are stored. vLLM finds such a
    length only within one block after a block boundary whose state is stored too.
    """

    def attach(self, coordinator: HybridAwareCoordinator) -> None:
        """Prepare an object that was made as `OffloadingConnectorScheduler`."""
        groups = self.config.kv_group_configs
        self._coordinator = coordinator
        self._states = [group for group in groups if group.requires_cow_source]
        self._attention = [group for group in groups if not group.requires_cow_source]
        self._unit: int = self.config.tokens_per_hash
        self._block: int = self._partial_tail_block_size
        coordinator.collects_answers = True

    def _lookup(
        self, req_status: RequestOffloadState, max_num_new_tokens: int | None = None
    ) -> int | None:
        """Find how many tokens after the local hit the tiers can serve.

        Return None if the request must wait: another request loads the same blocks, the hit is
        still being stored, or a tier has not answered yet or is being read.
        """
        status = req_status
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
        unknown = False
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
            # The lookups began to read the blocks of this hit into host memory. Read no others.
            return None
        return None if unknown else 0

    def _build_partial_tail_store_jobs(
        self, scheduler_output: SchedulerOutput
    ) -> dict[int, TransferJob]:
        jobs: dict[int, TransferJob] = super()._build_partial_tail_store_jobs(scheduler_output)
        return {**jobs, **self._answer_jobs()}

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        status = self._req_status.get(request.request_id)
        boundary = status and num_external_tokens and status.partial_tail_boundary
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if boundary:
            # vLLM counts the block in which the load ends as stored. The request will complete the
            # block, so without this no later turn of the conversation could be loaded.
            for group, state in zip(self.config.kv_group_configs, status.group_states, strict=True):
                complete = boundary // group.tokens_per_chunk
                state.next_stored_chunk_idx = min(state.next_stored_chunk_idx, complete)

    def _answer_jobs(self) -> dict[int, TransferJob]:
        """Make the transfers that store the states at the ends of answers, by job id."""
        jobs = {}
        for request, tokens in self._coordinator.take_finished_answers():
            status = self._req_status.get(request.request_id)
            job = status and self._answer_job(status, tokens)
            if job:
                jobs.update(job)
        return jobs

    def _answer_job(self, status: RequestOffloadState, tokens: int) -> dict[int, TransferJob]:
        request, groups = status.req, self.config.kv_group_configs
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
                key = self._make_boundary_key(request, group.group_idx, tokens, status.req_context)
                sources[key] = index, block[0].block_id
        output = self.manager.prepare_store(list(sources), status.req_context)
        if output is None or not output.keys_to_store:
            return {}
        stored = [sources[key] for key in output.keys_to_store]
        blocks = [block for _, block in stored]
        sizes, indices = [0] * len(groups), [0] * len(groups)
        for index, _ in stored:
            sizes[index], indices[index] = 1, -(-tokens // self._block) - 1
        job = self._generate_job_id()
        status.transfer_jobs.add(job)
        # If a block is allocated again before it is stored, vLLM makes the step wait for the copy.
        for block in blocks:
            self._block_id_to_pending_jobs.setdefault(block, set()).add(job)
        self._jobs[job] = TransferJobStatus(
            req_id=request.request_id,
            pending_count=self.config.num_workers,
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
            result = self.manager.lookup(key, status.req_context)
            if result is LookupResult.MISS:
                return result
            if result is not LookupResult.HIT:
                results = result
        return results

    def _is_loading(self, request: Request, local: int, tokens: int) -> bool:
        """Whether another request loads a block that a hit of `tokens` tokens would load."""
        loading = self._chunks_being_loaded
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
