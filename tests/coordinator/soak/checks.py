# SPDX-License-Identifier: Apache-2.0
"""Check block tables, reference counts, the free queue, hashes and contents after each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_block_hash, get_group_id
from vllm.v1.kv_cache_interface import MambaSpec

from testing.coordinator.contents import hashes_of
from testing.coordinator.events import EventReplay, cached_copies
from tests.coordinator.soak.plans import Plan
from tests.coordinator.soak.prefixes import Prefixes
from tests.coordinator.soak.worker import SoakError, Worker
from vllm_hybrid_kv.coordinator.block_map import GroupedBlockMap
from vllm_hybrid_kv.coordinator.checkpoints import Checkpoint
from vllm_hybrid_kv.coordinator.hybrid_policy import HybridAwareCoordinator
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashWithGroupId
    from vllm.v1.core.sched.scheduler import Scheduler


def require(condition: object, *what: object) -> None:
    """Raise a `SoakError` with the given description unless a condition holds."""
    if not condition:
        raise SoakError(" ".join(map(str, what)))


def check_references(scheduler: Scheduler) -> None:
    """Check that every reference count is right, and that unreferenced blocks are in the free list.

    The free list must be linked in both directions.
    """
    manager = scheduler.kv_cache_manager
    held: Counter[int] = Counter()
    for group in manager.coordinator.single_type_managers:
        for request_id, table in group.req_to_blocks.items():
            require(
                not table or request_id in scheduler.requests,
                "table of an ended request:",
                request_id,
            )
            held.update(block.block_id for block in table)
        for pair in group._pending_cow_copies:
            held.update(block.block_id for block in pair)
        for mapping in (group.num_cached_block, group._partial_hit_reqs):
            require(
                mapping.keys() <= scheduler.requests.keys(), "entry of an ended request:", mapping
            )
    if isinstance(manager.coordinator, HybridAwareCoordinator):
        for running in manager.coordinator._running.values():
            for blocks in (running.copies, *running.windows.values()):
                held.update(block.block_id for block in blocks)
    for _, blocks in scheduler.deferred_frees:
        held.update(block.block_id for block in blocks)
    pool: BlockPool = manager.block_pool
    for block in pool.blocks[1:]:
        require(block.ref_cnt == held[block.block_id], block, "is held", held[block.block_id])
    free = {block.block_id for block in pool.blocks[1:] if block.ref_cnt == 0}
    queue = pool.free_block_queue
    block, listed = queue.fake_free_list_head, []
    while block.next_free_block is not None:
        require(block.next_free_block.prev_free_block is block, "no way back to", block)
        block = block.next_free_block
        listed.append(block.block_id)
        require(len(listed) <= len(pool.blocks), "the free list is circular")
    require(block is queue.fake_free_list_tail, "the free list ends at", block)
    listed.pop()
    require(len(listed) == len(set(listed)) == queue.num_free_blocks, "free:", listed)
    require(set(listed) == free, "listed, not free:", set(listed) ^ free)
    for block in pool.blocks:
        linked = block.next_free_block is not None or block.prev_free_block is not None
        require(linked == (block.block_id in free), block, "is linked")


def num_entries(pool: BlockPool) -> int:
    """Count the pairs of a hash and a block in the hash map."""
    hash_map = pool.cached_block_hash_to_block
    if isinstance(hash_map, GroupedBlockMap):
        copies = hash_map._copies.values()
        require(all(len(blocks) > 1 for blocks in copies), "copies of one block")
        return len(hash_map) + sum(len(blocks) - 1 for blocks in copies)
    found = hash_map._cache.values()
    return sum(len(entry) if isinstance(entry, dict) else 1 for entry in found)


def check_hash_map(pool: BlockPool) -> None:
    """Check that the hash map has every hash that a block carries, and no others."""
    hash_map = pool.cached_block_hash_to_block
    carried = 0
    for block in pool.blocks:
        keys = hashes_of(pool, block)
        carried += len(set(keys))
        for key in keys:
            require(hash_map.contain(key, block.block_id), block, "is not under its key", key)
        require(len({get_group_id(key) for key in keys}) <= 1, block, "is in several groups")
    for block_id in pool.cached_block_hashes_by_block:
        require(pool.blocks[block_id].block_hash, block_id, "has other hashes and no first")
    # Every carried key has an entry. If the numbers are equal, there are no more entries.
    found = num_entries(pool)
    require(found == carried, found, "entries,", carried, "are carried")


def check_events(scheduler: Scheduler, replay: EventReplay, published: list[KVCacheEvent]) -> None:
    """Apply new events, published and queued ones, and check that they lead to the hash map.

    Events of vLLM's own coordinator may have more tokens than hashes (vllm-project/vllm#44451).
    """
    manager = scheduler.kv_cache_manager
    well_formed = isinstance(manager.coordinator, FixedPointCoordinator)
    replay.apply([*published, *manager.take_events()], well_formed)
    published.clear()
    found, cached = +replay.copies, cached_copies(manager.block_pool)
    require(found == cached, "events:", found - cached, "hash map:", cached - found)


class Contents:
    """Checks that blocks hold the contents that their hashes promise."""

    def __init__(self, pool: BlockPool, plan: Plan, worker: Worker, prefixes: Prefixes) -> None:
        self._pool, self._plan, self._worker, self._prefixes = pool, plan, worker, prefixes
        # The version of each block at its last check, to skip unchanged blocks.
        self._seen: list[tuple[Any, ...] | None] = [None] * plan.num_blocks

    def check(self, meaning: Mapping[BlockHash, tuple[int, int]]) -> None:
        """Check all blocks between two steps. `meaning` maps each hash to its prefix and length."""
        for block in self._pool.blocks:
            if block.block_hash is None:
                continue
            keys = hashes_of(self._pool, block)
            version = self._worker.versions[block.block_id]
            seen = (version, block.block_hash_num_tokens, *keys)
            if seen == self._seen[block.block_id]:
                continue
            for key in keys:
                self._check_key(block, key, *meaning[get_block_hash(key)])
            self._seen[block.block_id] = seen

    def _check_key(
        self, block: KVCacheBlock, key: BlockHashWithGroupId, prefix: int, tokens: int
    ) -> None:
        group = get_group_id(key)
        if key == block.block_hash:
            require(block.block_hash_num_tokens == tokens, block, "ends at", tokens)
        spec = self._plan.specs[group]
        if isinstance(spec, MambaSpec):
            promised = [prefix]
        else:
            count = tokens - (tokens - 1) // spec.block_size * spec.block_size
            promised = self._prefixes.path(prefix, count)
            if group in self._worker.draft_groups:
                # An entry of a draft layer depends on the next token too, so entry i has the prefix
                # i + 1. The token after the last entry is unknown.
                promised = promised[1:]
        require(
            self._worker.differs(group, block.block_id, 0, promised) is None,
            f"{block} of group {group} is cached for {tokens} tokens with {promised}, but has",
            self._worker.blocks[block.block_id],
        )


def check_policy(
    scheduler: Scheduler,
    lost: set[int],
    hashes: Mapping[BlockHash, list[BlockHash]],
    unhittable: set[Checkpoint],
) -> None:
    """Check the data structures of `hybrid_aware`.

    Args:
        scheduler: The scheduler.
        lost: Allocated blocks whose hashes were removed. vLLM does not cache them again, so later
            checkpoints of a running request that need these blocks cannot be hit.
        hashes: For each hash of a prefix, all block hashes of a request with this prefix.
        unhittable: Checkpoints that need lost blocks. Every call adds to this set.
    """
    coordinator = scheduler.kv_cache_manager.coordinator
    if not isinstance(coordinator, HybridAwareCoordinator):
        return
    check_queue(coordinator)
    _check_checkpoints(coordinator)
    _check_hits(coordinator, lost, hashes, unhittable)
    tables = {
        request_id
        for group in coordinator.single_type_managers
        for request_id, table in group.req_to_blocks.items()
        if table
    }
    require(coordinator._running.keys() <= tables, "run on:", coordinator._running.keys() - tables)


def check_queue(coordinator: HybridAwareCoordinator) -> None:
    """Check that the queue has all unpinned blocks first, and then only pinned blocks."""
    queue = coordinator.block_pool.free_block_queue
    free = queue.get_all_free_blocks()
    first = [block.block_id for block in free[: len(queue.unpinned)]]
    require(set(first) == queue.unpinned, "first part:", first, "not", queue.unpinned)
    second = free[len(first) :]
    border = second[0] if second else queue.fake_free_list_tail
    require(queue._first_pinned is border, "border at", queue._first_pinned, "not", border)
    useless = [block for block in second if not queue.is_pinned(block)]
    require(not useless, "pinned without need:", useless)


def _check_checkpoints(coordinator: HybridAwareCoordinator) -> None:
    checkpoints = coordinator.checkpoints
    kept = checkpoints.pinned
    needed: Counter[int] = Counter()
    extensions: dict[int, set[Checkpoint]] = {}
    for place, checkpoint in enumerate(kept):
        require(checkpoint.pinned and checkpoint.slot == place, "misplaced:", checkpoint)
        require(checkpoints._tracked[checkpoint.key] is checkpoint, "unknown:", checkpoint)
        needed.update(checkpoint.blocks)
        ancestor = checkpoint.parent if checkpoint.supersedes else None
        while ancestor is not None:
            if ancestor.pinned:
                extensions.setdefault(id(ancestor), set()).add(checkpoint)
            stops = ancestor.pinned and ancestor.supersedes
            ancestor = None if stops else ancestor.parent
    require(needed == checkpoints.pins, "needed:", needed, "not", checkpoints.pins)
    require(
        sum(checkpoint.pinned for checkpoint in checkpoints._tracked.values()) == len(kept),
        "kept and not listed",
    )
    for checkpoint in checkpoints._tracked.values():
        expected = extensions.get(id(checkpoint), set())
        require(checkpoint.extensions == expected, "extensions of", checkpoint)


def _check_hits(
    coordinator: HybridAwareCoordinator,
    lost: set[int],
    hashes: Mapping[BlockHash, list[BlockHash]],
    unhittable: set[Checkpoint],
) -> None:
    pool = coordinator.block_pool
    for checkpoint in coordinator.checkpoints.pinned:
        states = pool.get_cached_block(checkpoint.key, coordinator._state_groups)
        require(states is not None, "no state:", checkpoint)
        # A draft layer also looks up the next block, which may be another request's. Skip these.
        if not lost.isdisjoint(checkpoint.blocks):
            unhittable.add(checkpoint)
        if not coordinator.eagle_group_ids and checkpoint not in unhittable:
            found = coordinator.reconcile(
                hashes[checkpoint.key], checkpoint.tokens, coordinator.attention_groups
            ).length
            require(found == checkpoint.tokens, "a hit of", found, "tokens at", checkpoint)
