# SPDX-License-Identifier: Apache-2.0
"""Which blocks host memory evicts first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm.v1.kv_offload.base import (
    OffloadKey,
    ReqContext,
    get_offload_block_hash,
    get_offload_group_idx,
    make_offload_key,
)
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus
from vllm.v1.kv_offload.cpu.policies.factory import CachePolicyFactory

from vllm_hybrid_kv.coordinator.checkpoints import Checkpoint, Checkpoints

POLICY = "hybrid_kv_checkpoints"
"""The policy's name in vLLM's registry of policies."""


class CheckpointPolicy(CachePolicy):
    """Evicts whole checkpoints from host memory, in the order that `Checkpoints` defines.

    A chunk is one block in host memory. Chunks that no checkpoint needs are evicted first, in the
    order in which they became evictable.
    """

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._chunks: dict[OffloadKey, ChunkStatus] = {}
        self._keys: dict[int, OffloadKey] = {}
        self._evictable: set[OffloadKey] = set()
        self._unpinned: dict[OffloadKey, None] = {}
        self.set_groups((), 1)

    def set_groups(self, state_groups: Sequence[int], block_tokens: int) -> None:
        """Set the KV groups with states, and the tokens of a block. All groups have equal blocks.

        In the `Checkpoints` of host memory, the ids of chunks stand for the ids of blocks.
        """
        self._state_groups = state_groups
        self.checkpoints = Checkpoints(len(state_groups), block_tokens)

    def enter(self, checkpoint: Checkpoint, age: int, keys: Sequence[OffloadKey]) -> None:
        """Pin the chunks of a checkpoint that the device evicts next.

        Args:
            checkpoint: The device's checkpoint.
            age: Its age there, in requests.
            keys: The keys of all its chunks. All have been inserted.
        """
        blocks = [
            self._chunks[key].chunk_id
            for key in keys
            if get_offload_group_idx(key) not in self._state_groups
        ]
        released = self.checkpoints.adopt(checkpoint, age, blocks)
        for key in keys:
            if self._is_pinned(key):
                self._unpinned.pop(key, None)
        self._release(self._keys[chunk_id] for chunk_id in released)

    def _is_pinned(self, key: OffloadKey) -> bool:
        if get_offload_group_idx(key) in self._state_groups:
            return self.checkpoints.pinned_at(get_offload_block_hash(key)) is not None
        return self._chunks[key].chunk_id in self.checkpoints.pins

    def _release(self, keys: Iterable[OffloadKey]) -> None:
        for key in keys:
            if key in self._evictable and not self._is_pinned(key):
                self._unpinned[key] = None

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self._chunks.get(key)

    # vLLM 0.33 adds the context of a request.
    def insert(self, key: OffloadKey, chunk: ChunkStatus, *_: ReqContext) -> None:
        self._chunks[key] = chunk
        self._keys[chunk.chunk_id] = key

    def remove(self, key: OffloadKey) -> None:
        self.mark_non_evictable(key)
        del self._keys[self._chunks.pop(key).chunk_id]

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        """Do nothing, because the coordinator records in `checkpoints` which prompts arrive."""

    def mark_evictable(self, key: OffloadKey) -> None:
        self._evictable.add(key)
        self._release((key,))

    def mark_non_evictable(self, key: OffloadKey) -> None:
        self._evictable.discard(key)
        self._unpinned.pop(key, None)

    def evict(
        self, n: int, protected: set[OffloadKey]
    ) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        if len(self._evictable) - len(self._evictable & protected) < n:
            return None
        while len(victims := [key for key in self._unpinned if key not in protected]) < n:
            checkpoint = self.checkpoints.evict()
            assert checkpoint is not None, "all chunks are unpinned, so enough can be evicted"
            self._release(make_offload_key(checkpoint.key, one) for one in self._state_groups)
            self._release(self._keys[chunk_id] for chunk_id in checkpoint.blocks)
        evicted = [(key, self._chunks[key]) for key in victims[:n]]
        for key, _ in evicted:
            self.remove(key)
        return evicted

    def clear(self) -> None:
        self._chunks.clear()
        self._keys.clear()
        self._evictable.clear()
        self._unpinned.clear()
        self.checkpoints.clear()


CachePolicyFactory.register_cache_policy(POLICY, __name__, CheckpointPolicy.__name__)
