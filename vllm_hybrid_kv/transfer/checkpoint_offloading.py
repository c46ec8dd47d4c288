# SPDX-License-Identifier: Apache-2.0
"""The scheduler side of vLLM's OffloadingConnector for checkpoints: what is stored and found.

vLLM's own scheduler side stores every full block when it is computed. With states, that wastes host
memory: most blocks belong to no checkpoint, and the device still has what was just stored.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferJob
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
    OffloadingConnectorScheduler,
    RequestOffloadState,
    TransferJobStatus,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import (
    GPULoadStoreSpec,
    LookupResult,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    make_offload_key,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.factory import OffloadingSpecFactory
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager
from vllm.v1.request import Request

from vllm_hybrid_kv.coordinator.checkpoints import Checkpoint
from vllm_hybrid_kv.coordinator.hybrid_policy import HybridAwareCoordinator
from vllm_hybrid_kv.transfer.checkpoint_policy import POLICY, CheckpointPolicy
from vllm_hybrid_kv.transfer.tiered_offloading import TieredOffloading

OWNER = "hybrid_kv-checkpoints"
"""The request id of all stores. A checkpoint outlives the request that computed it."""


def offload_checkpoints(connector: Any, coordinator: Any) -> None:
    """Make an OffloadingConnector offload whole checkpoints, if it and the coordinator can.

    Args:
        connector: A connector in the scheduler, of any class.
        coordinator: The scheduler's coordinator, of any class.
    """
    scheduler = getattr(connector, "connector_scheduler", None)
    if (
        not isinstance(coordinator, HybridAwareCoordinator)
        or not isinstance(scheduler, OffloadingConnectorScheduler)
        # All groups have blocks of one size, and hits end inside blocks.
        or not scheduler.config.supports_partial_tail
        or any(group.is_eagle_group for group in scheduler.config.kv_group_configs)
    ):
        return
    if type(scheduler.manager) is TieringOffloadingManager:
        # A second object would make a second region of shared memory.
        scheduler.__class__ = TieredOffloading
        scheduler.attach(coordinator)
        return
    config, plan = connector._vllm_config, connector._kv_cache_config
    spec = OffloadingSpecFactory.create_spec(build_offloading_config(config, plan))
    # With another policy, the scheduler side is vLLM's.
    if type(spec).get_manager is CPUOffloadingSpec.get_manager and (
        "eviction_policy" not in spec.extra_config
    ):
        scheduler.shutdown()
        connector.connector_scheduler = CheckpointOffloading(spec, config, plan, coordinator)


class CheckpointOffloading(OffloadingConnectorScheduler):
    """Stores the checkpoints that the device evicts next, and finds the longest that is stored.

    A stored checkpoint is its states, and all attention blocks of its prefix. Checkpoints with a
    common prefix share blocks.
    """

    def __init__(
        self,
        spec: CPUOffloadingSpec,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        coordinator: HybridAwareCoordinator,
    ) -> None:
        spec.eviction_policy = POLICY
        super().__init__(spec, vllm_config, kv_cache_config)
        groups = self.config.kv_group_configs
        self._states = [group for group in groups if group.requires_cow_source]
        self._attention = [group for group in groups if not group.requires_cow_source]
        self._unit = self.config.tokens_per_hash
        self._block = self._partial_tail_block_size
        policy = self.manager._policy
        assert isinstance(policy, CheckpointPolicy)
        self._policy = policy
        policy.set_groups([group.group_idx for group in self._states], self._block)
        self._coordinator = coordinator
        coordinator.use_host_memory(policy.checkpoints, self._is_stored)
        owner = Request(OWNER, [0], SamplingParams(max_tokens=1), None)
        self._req_status[OWNER] = RequestOffloadState(
            self.config, owner, ReqContext(OWNER), RequestOffloadingContext()
        )

    def _is_stored(self, checkpoint: Checkpoint) -> bool:
        if self._policy.checkpoints.pinned_at(checkpoint.key) is None:
            return False
        chunk = self._policy.get(make_offload_key(checkpoint.key, self._states[0].group_idx))
        return chunk is not None and bool(chunk.is_ready)

    def _lookup(
        self, req_status: RequestOffloadState, max_num_new_tokens: int | None = None
    ) -> int | None:
        """Return how many tokens after the local hit the longest stored checkpoint covers.

        Return None if a part of it is still being stored.
        """
        request, local = req_status.req, req_status.num_locally_computed_tokens
        req_status.partial_tail_boundary = None
        limit = request.num_tokens - 1
        for most in (max_num_new_tokens, req_status.max_load_tokens):
            if most is not None:
                limit = min(limit, local + most)
        hashes = request.block_hashes
        pinned_at = self._policy.checkpoints.pinned_at
        for units in range(min(limit // self._unit, len(hashes)), local // self._unit, -1):
            if pinned_at(hashes[units - 1]) is None:
                continue
            tokens = units * self._unit
            results = {
                self.manager.lookup(key, req_status.req_context)
                for key in self._keys(hashes, tokens, local)
            }
            if LookupResult.MISS in results:
                continue
            if results != {LookupResult.HIT}:
                return None
            if tokens % self._block:
                req_status.partial_tail_boundary = tokens
            return tokens - local
        return 0

    def _keys(self, hashes: list[BlockHash], tokens: int, local: int) -> list[OffloadKey]:
        """Return the keys that a hit of `tokens` needs if the device has `local` whole blocks."""
        end = hashes[tokens // self._unit - 1]
        per_block = self._block // self._unit
        whole = hashes[local // self._unit + per_block - 1 : tokens // self._unit : per_block]
        tail = [end] if tokens % self._block else []
        return _keys_of(self._states, [end]) + _keys_of(self._attention, [*whole, *tail])

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Build the step's copies. Requests own loads only, so a preemption ends no copy.

        vLLM 0.32 asserts that the copies of a preempted request are stores. But a reset of the
        cache preempts requests, which may load in the same step.
        """
        if scheduler_output.preempted_req_ids:
            scheduler_output = replace(scheduler_output, preempted_req_ids=None)
        return super().build_connector_meta(scheduler_output)

    def _update_req_states(self, scheduler_output: SchedulerOutput) -> None:
        """Collect the blocks that the step allocates. Stores do not need the requests' tables."""
        tables = [new.block_ids for new in scheduler_output.scheduled_new_reqs]
        tables += [ids for ids in scheduler_output.scheduled_cached_reqs.new_block_ids if ids]
        allocated = self._current_batch_allocated_block_ids
        for table in tables:
            allocated.update(*table)
        allocated.update(copy.dst_block_id for copy in scheduler_output.kv_cache_block_copies or ())
        allocated.discard(0)

    def _build_store_jobs(self, scheduler_output: SchedulerOutput) -> dict[int, TransferJob]:
        return {}

    def _build_partial_tail_store_jobs(
        self, scheduler_output: SchedulerOutput
    ) -> dict[int, TransferJob]:
        jobs = (self._store(*leaving) for leaving in self._coordinator.leaving())
        return dict(job for job in jobs if job is not None)

    def _store(
        self, checkpoint: Checkpoint, states: list[KVCacheBlock]
    ) -> tuple[int, TransferJob] | None:
        """Start to store the parts of a checkpoint that are not stored yet."""
        sources = self._blocks_by_group(checkpoint, states)
        keys = [key for blocks in sources for key in blocks]
        output = self.manager.prepare_store(keys, ReqContext(OWNER))
        if output is None:
            return None
        self._policy.enter(checkpoint, self._coordinator.checkpoints.age(checkpoint), keys)
        if not output.keys_to_store:
            return None
        stored = set(output.keys_to_store)
        # Keys and blocks are in the order of the groups, as vLLM's worker expects.
        sizes = [len(stored & blocks.keys()) for blocks in sources]
        block_ids = [
            block_id for blocks in sources for key, block_id in blocks.items() if key in stored
        ]
        job_id = self._generate_job_id()
        for block_id in block_ids:
            self._block_id_to_pending_jobs.setdefault(block_id, set()).add(job_id)
        self._req_status[OWNER].transfer_jobs.add(job_id)
        self._jobs[job_id] = TransferJobStatus(
            req_id=OWNER,
            pending_count=self.config.num_workers,
            keys=stored,
            is_store=True,
            fenced_block_ids=block_ids,
        )
        # The indices of blocks matter only if a chunk has several blocks.
        source = GPULoadStoreSpec(block_ids, group_sizes=sizes, block_indices=[0] * len(sizes))
        return job_id, TransferJob(OWNER, source, output.store_spec)

    def _blocks_by_group(
        self, checkpoint: Checkpoint, states: list[KVCacheBlock]
    ) -> list[dict[OffloadKey, int]]:
        """Return the ids of a checkpoint's blocks by key, for each group."""
        tail = [checkpoint.key] if checkpoint.tokens % self._block else []
        hashes = [*checkpoint.prefix, *tail]
        state_ids = iter([block.block_id for block in states])
        attention_ids = iter(checkpoint.blocks)
        sources = []
        for group in self.config.kv_group_configs:
            if group in self._states:
                sources.append({make_offload_key(checkpoint.key, group.group_idx): next(state_ids)})
            else:
                keys = _keys_of([group], hashes)
                sources.append(dict(zip(keys, islice(attention_ids, len(keys)), strict=True)))
        return sources


def _keys_of(groups: list[GroupOffloadConfig], hashes: list[BlockHash]) -> list[OffloadKey]:
    """Return the key of each hash in each group, the keys of a group next to each other."""
    return [make_offload_key(key, group.group_idx) for group in groups for key in hashes]
