# SPDX-License-Identifier: Apache-2.0
"""The policy `hybrid_aware`: where states are cached, and what is evicted first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_coordinator import replay_boundaries
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, get_block_hash
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    MambaSpec,
    get_mamba_prefill_checkpoint_position,
)
from vllm.v1.request import Request, RequestStatus

from vllm_hybrid_kv.coordinator.checkpoints import Checkpoint, CheckpointKind, Checkpoints
from vllm_hybrid_kv.coordinator.decode_snapshots import DecodeSnapshots, Running, first_needed
from vllm_hybrid_kv.coordinator.free_queue import CheckpointQueue
from vllm_hybrid_kv.coordinator.longest_hit import FixedPointCoordinator
from vllm_hybrid_kv.coordinator.traffic import AnswerReturns, SeenPrefixes, Turn

SEEN_LIMITS = (1 << 20, 1 << 22)
"""The bounds of the capacity of `SeenPrefixes`, in hashes. Each hash takes 2 to 4 bytes."""

STATES_OF_PROMPT = 3
"""Blocks per state group that a prompt may hold while it is computed: the states at the start and
the end of a chunk, and one cached state. vLLM counts one block for a waiting prompt."""

RARE = 0.25
"""If a smaller share of answers recurs in the next prompt, the states of decoding requests are not
copied. Answers of reasoning models, for example, recur without the reasoning."""

CLEAN_SHARE = 16
"""With host memory, one block in 16 (and at least as many as the largest checkpoint needs) is kept
free or has a copy there, so that evictions need not wait for copies."""

PROMPT_ENDS = (CheckpointKind.PROMPT, CheckpointKind.SHORT)
TURN_ENDS = (*PROMPT_ENDS, CheckpointKind.ANSWER)


class HybridAwareCoordinator(FixedPointCoordinator):
    """A coordinator for models with states (Mamba, Gated DeltaNet) in cache mode `align`.

    **Where states are cached.** The state at a prompt's end (rounded down to the match unit) is
    cached, because the next turn of a conversation resumes there. The state at an answer's end is
    cached if answers recur in the next prompts (`DecodeSnapshots`). The state at a branch point is
    cached when a second prompt reveals the branch. vLLM also caches states at block boundaries.
    These states are pinned only if they are worth at least as much as the latest evictions.

    **Eviction order.** Blocks that no checkpoint needs are evicted first: attention blocks after
    the last checkpoint, other states, and duplicates of other requests' blocks. Whole checkpoints
    follow, starting with those that save the least compute for their memory (`Checkpoints`).

    **Unchanged.** The queue holds free blocks only. `FixedPointCoordinator` looks up hits in vLLM's
    hash map. Copy-on-write of partial blocks, preemption, events and connectors are vLLM's code.
    """

    def __init__(self, **factory_args: Any) -> None:
        super().__init__(**factory_args)
        managers = dict(enumerate(self.single_type_managers))
        states = {
            group: manager
            for group, manager in managers.items()
            if isinstance(manager, MambaManager)
        }
        self._state_groups = list(states)
        cached = sorted(group for lookup in self.attention_groups for group in lookup.group_ids)
        self._attention_managers = {
            group: managers[group] for group in cached if group not in states
        }
        self._unit = self.hash_block_size
        self._block_tokens = managers[self._state_groups[0]].block_size
        pool = self.block_pool
        self.checkpoints = Checkpoints(len(states), self._block_tokens)
        hashes = 2 * pool.num_gpu_blocks * self._block_tokens // self._unit
        self._seen = SeenPrefixes(min(max(hashes, SEEN_LIMITS[0]), SEEN_LIMITS[1]))
        self._running: dict[str, Running] = {}
        windows = {
            group: manager
            for group, manager in self._attention_managers.items()
            if manager.get_num_skipped_tokens(factory_args["max_model_len"]) > 0
        }
        self._snapshots = DecodeSnapshots(states, windows, pool, self._cache_hit_alignment_tokens)
        self._returns = AnswerReturns()
        self._stored: Checkpoints | None = None
        self._largest = 0
        self._clean = pool.num_gpu_blocks // CLEAN_SHARE
        self._queue = pool.free_block_queue = CheckpointQueue(
            pool, self.checkpoints, self._state_groups
        )
        self.collects_answers = False
        """Whether `take_finished_answers` is called in every step, because there is a host tier."""
        self._finished_answers: list[tuple[Request, int]] = []
        # vLLM's manager evicts through the pool, so redirect that call to this coordinator.
        self._evict_blocks = pool.evict_blocks
        pool.evict_blocks = self.evict_blocks

    @staticmethod
    def suits(kv_cache_config: KVCacheConfig) -> bool:
        """Whether there are attention and state groups, and all states have cache mode `align`."""
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        states = [spec for spec in specs if isinstance(spec, MambaSpec)]
        return 0 < len(states) < len(specs) and all(
            spec.mamba_cache_mode == "align" for spec in states
        )

    def attach(self, kv_cache_manager: Any) -> None:
        """Make vLLM cache states at branch points inside blocks, even without EAGLE."""
        super().attach(kv_cache_manager)
        if self.enable_partial_hash_hits and self.num_reprefillable_tokens == 0:
            kv_cache_manager.mamba_shared_prefix_checkpoint = True
            for group in self._state_groups:
                self.single_type_managers[group].shared_prefix_checkpoint = True

    def use_host_memory(self, stored: Checkpoints, is_stored: Callable[[Checkpoint], bool]) -> None:
        """Start to evict checkpoints to host memory, in which `stored` tracks them."""
        self._stored = stored
        self.checkpoints.is_stored = is_stored

    def leaving(self) -> Iterator[tuple[Checkpoint, list[KVCacheBlock]]]:
        """Yield the checkpoints, with their states, that are to be copied to host memory now."""
        checkpoints = self.checkpoints
        clean = len(self._queue.unpinned) + sum(map(checkpoints.own_blocks, checkpoints.outgoing))
        while clean < max(self._clean, self._largest):
            leaving = checkpoints.next_outgoing(self._can_leave)
            if leaving is None:
                return
            states = self.block_pool.get_cached_block(leaving.key, self._state_groups)
            assert states is not None
            clean += checkpoints.own_blocks(leaving)
            yield leaving, states

    def _can_leave(self, checkpoint: Checkpoint) -> bool:
        """Whether the states of a checkpoint are complete and no request holds them."""
        states = self.block_pool.get_cached_block(checkpoint.key, self._state_groups)
        return states is not None and all(block.ref_cnt == 0 for block in states)

    def stats(self) -> Counter[tuple[str, str | None]]:
        return self.checkpoints.counts

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Evict blocks that a connector failed to load, and the checkpoints that need them."""
        self._evict_blocks(block_ids)
        for running in self._running.values():
            held = chain.from_iterable(running.windows.values())
            if not block_ids.isdisjoint(block.block_id for block in held):
                self._snapshots.release(running)
        for checkpoint in tuple(self.checkpoints.pinned):
            if block_ids.isdisjoint(checkpoint.blocks):
                self._queue.recheck(checkpoint.key)
            else:
                self._queue.drop(checkpoint)
        blocks = [self.block_pool.blocks[block_id] for block_id in block_ids]
        self._queue.unpin([block for block in blocks if not self._queue.is_pinned(block)])

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """Find the longest prefix that every group can serve, and the branch point after it.

        Returns:
            The blocks of each group; the hit in tokens; and the tokens from the end of the hit to
            the branch point, or 0. vLLM ends a chunk at the branch point and keeps its state.
        """
        blocks, hit, _ = super().find_longest_cache_hit(block_hashes, max_cache_hit_length)
        units = self._seen.longest(block_hashes, max_cache_hit_length // self._unit)
        branch = round_down(units * self._unit, self._cache_hit_alignment_tokens)
        if branch <= hit or self._seen.is_end(block_hashes[units - 1]):
            return blocks, hit, 0
        return blocks, hit, branch - hit

    def allocate_new_blocks(
        self, request_id: str, *args: Any, **kwargs: Any
    ) -> tuple[list[KVCacheBlock], ...]:
        blocks = super().allocate_new_blocks(request_id, *args, **kwargs)
        running = self._running.get(request_id)
        if (
            running is not None
            and self._snapshots.is_due(running.request)
            and self._returns.rate >= RARE
        ):
            self._snapshots.copy(running, len(self._running))
        return blocks

    def get_num_blocks_to_allocate(self, request_id: str, *args: Any, **kwargs: Any) -> int:
        """Return how many blocks a step of a request needs.

        If a request's state stays cached, the request continues in a new block of each state group.
        If no block is free, evict the cached state, so that vLLM need not preempt a request.

        vLLM also asks whether a whole waiting prompt would fit. In that case, add the blocks that
        running prompts still need. Without these blocks, vLLM would start the prompt, preempt it
        later and waste its computation.
        """
        needed = super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        if kwargs.get("apply_admission_cap"):
            # Requests that wait for a load hold blocks too, but do not run. If no request runs,
            # no blocks will be freed, so the prompt must start with the blocks that are free.
            requests = [running.request for running in self._running.values()]
            scheduled = [one for one in requests if one.status is RequestStatus.RUNNING]
            if scheduled:
                own = (STATES_OF_PROMPT - 1) * len(self._state_groups)
                return needed + own + self._missing_blocks(scheduled)
        pool = self.block_pool
        # A request that needs more blocks than the pool has must wait in any case.
        needs_more = pool.get_num_free_blocks() < needed <= pool.num_gpu_blocks
        if needs_more and self._free_optional_states(request_id):
            needed = super().get_num_blocks_to_allocate(request_id, *args, **kwargs)
        return needed

    def _missing_blocks(self, requests: Iterable[Request]) -> int:
        """Return how many blocks requests still need for their prompts."""
        missing = 0
        for request in requests:
            # A preempted request recomputes its answer too.
            end = max(request.num_prompt_tokens, request.num_tokens - 1)
            if request.num_computed_tokens >= end:
                continue
            for manager in self._attention_managers.values():
                blocks = -(-request.num_tokens // manager.block_size)
                missing += max(blocks - len(manager.req_to_blocks[request.request_id]), 0)
            for group in self._state_groups:
                table = self.single_type_managers[group].req_to_blocks[request.request_id]
                held = sum([not block.is_null for block in table])
                missing += max(STATES_OF_PROMPT - held, 0)
        return missing

    def _free_optional_states(self, request_id: str) -> bool:
        """Free a request's cached states, and all copies of states. Return whether any existed."""
        freed = False
        keys: set[BlockHash] = set()
        for group in self._state_groups:
            manager = self.single_type_managers[group]
            kept = manager._partial_hit_reqs.get(request_id)
            # Skip a request that has not started: it still needs a copy of the state that it hit.
            if kept is None or request_id not in manager._allocated_block_reqs:
                continue
            _, block = manager._partial_hit_reqs.pop(request_id)
            manager._producer_partial_tail_reqs.pop(request_id, None)
            if block.block_hash is not None:
                keys.add(get_block_hash(block.block_hash))
            self.block_pool._maybe_evict_cached_block(block)
            freed = True
        # Another request with the same prefix may have a checkpoint that needs an evicted state.
        for key in keys:
            self._queue.recheck(key)
        for running in self._running.values():
            if running.copies:
                self._snapshots.release(running)
                freed = True
        return freed

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Cache a request's blocks, and register the checkpoints that it has reached."""
        if not self._cache_new_blocks(request, num_computed_tokens):
            return
        running = self._running.get(request.request_id) or self._start(request)
        if running.partial:
            cached = sum(
                [
                    manager.num_cached_block.get(request.request_id, 0)
                    for manager in self._attention_managers.values()
                ]
            )
            if cached != running.cached or num_computed_tokens <= request.num_prompt_tokens:
                running.cached = cached
                # vLLM replaces a block's entry for a shorter prefix by one for a longer prefix. An
                # attention block still holds the shorter prefix, so cache its entry again.
                self._cache_partial(running)
        units = num_computed_tokens // self._unit
        if units <= running.units:
            return
        running.units = units
        tokens = units * self._unit
        if tokens in self._prompt_ends(request):
            running.prompt_end = self._enter(running, tokens, CheckpointKind.PROMPT)
        elif tokens == request.shared_prefix_boundary:
            self._enter(running, tokens, CheckpointKind.BRANCH)
        elif tokens % self._block_tokens == tokens % self._cache_hit_alignment_tokens == 0:
            entered = self._enter(running, tokens, CheckpointKind.BOUNDARY)
            if entered is None and self.collects_answers:
                self._keep_from_connector(request.request_id, tokens)

    def _prompt_ends(self, request: Request) -> set[int]:
        """Return where the next turn (with drafts, also the same prompt) can resume, in tokens."""
        length = request.num_prompt_tokens
        drafts = bool(self.eagle_group_ids)
        end = get_mamba_prefill_checkpoint_position(
            length, self._cache_hit_alignment_tokens, drafts
        )
        boundaries = replay_boundaries(length, self.scheduler_block_size, drafts) if drafts else ()
        return {end, *boundaries}

    def _start(self, request: Request) -> Running:
        hashes = request.block_hashes
        limit = self._seen.longest(hashes, len(hashes))
        if request.num_preemptions:
            # A preempted request is not new: it returns to its own checkpoints.
            latest = self.checkpoints.longest(hashes)
            turn = Turn.FIRST if latest is None else latest.turn
        else:
            latest = self.checkpoints.arrive(hashes, limit)
            if self._stored is not None:
                self._stored.arrive(hashes, limit)
            if latest is not None and latest.uses == 1:
                if latest.place is CheckpointKind.ANSWER:
                    self._returns.record(True)
                elif latest.place in PROMPT_ENDS and latest.answered:
                    self._returns.record(limit * self._unit >= latest.answered)
            if 0 < limit < len(hashes):
                self._seen.discard_end(hashes[limit - 1])
            self._seen.add(hashes)
            turn = Turn.of(request.num_prompt_tokens, 0 if latest is None else latest.end)
        running = Running(request, latest, len(hashes), turn)
        return self._running.setdefault(request.request_id, running)

    def _enter(self, running: Running, tokens: int, place: CheckpointKind) -> Checkpoint | None:
        """Register a checkpoint if its states are cached, and return it if it is pinned."""
        request = running.request
        units = tokens // self._unit
        if units > len(request.block_hashes):
            # With draft layers, vLLM hashes a unit only after the tokens that follow it are known.
            return None
        key = request.block_hashes[units - 1]
        states = self.block_pool.get_cached_block(key, self._state_groups)
        if states is None:
            return None
        at_boundary = place is CheckpointKind.BOUNDARY
        is_answer = place is CheckpointKind.ANSWER
        checkpoint, released = self.checkpoints.enter(
            key,
            tokens,
            place,
            blocks=self._attention_blocks(running, tokens),
            parent=(at_boundary and running.boundary) or running.latest,
            supersedes=not at_boundary and (not is_answer or self._answer_supersedes(running)),
            turn=running.turn,
        )
        if released is not None:
            self._queue.release(key, released)
        if checkpoint is None:
            return None
        if at_boundary:
            running.boundary = checkpoint
        else:
            running.latest = checkpoint
        if not checkpoint.pinned:
            return None
        # Lookups may return another request's states, which were not pinned yet.
        self._queue.repin(states)
        for group, manager in self._attention_managers.items():
            if tokens % manager.block_size and manager.supports_fine_grained_hash_lookup:
                table = manager.req_to_blocks[request.request_id]
                running.partial.append((group, table[tokens // manager.block_size], tokens))
        self._cache_partial(running)
        if self._stored is not None:
            self._largest = max(self._largest, len(states) + len(checkpoint.blocks))
            per_block = self._block_tokens // self._unit
            checkpoint.prefix = tuple(request.block_hashes[per_block - 1 : units : per_block])
        return checkpoint

    def _keep_from_connector(self, request_id: str, tokens: int) -> None:
        """Do not offer the states at a block boundary to a KV connector, if they are not pinned."""
        for group in self._state_groups:
            manager = self.single_type_managers[group]
            manager._pending_boundary_state_offloads = [
                offer
                for offer in manager._pending_boundary_state_offloads
                if (offer[0], offer[3]) != (request_id, tokens)
            ]

    def take_finished_answers(self) -> list[tuple[Request, int]]:
        """Return the requests that ended since the last call, and where their answers' states are.

        The states are cached at that number of tokens, unless they have been evicted since.
        """
        answers, self._finished_answers = self._finished_answers, []
        return answers

    def _answer_supersedes(self, running: Running) -> bool:
        """Whether an answer's end is expected to save more tokens than the end of its prompt.

        If both are pinned, a next turn that repeats the answer saves the answer's tokens with the
        former, and any other next turn saves the prompt's tokens with the latter.
        """
        rate, prompt = self._returns.rate, running.request.num_prompt_tokens
        return rate * (running.copied - prompt) > (1 - rate) * prompt

    def _attention_blocks(self, running: Running, tokens: int) -> list[int] | None:
        """Return the ids of a request's attention blocks that a hit of `tokens` tokens needs.

        Return None if a window has moved past some of these blocks, or if some are not cached.
        """
        needed: list[int] = []
        for group, manager in self._attention_managers.items():
            table = manager.req_to_blocks[running.request.request_id]
            first = first_needed(manager, tokens)
            blocks = table[first : -(-tokens // manager.block_size)]
            if tokens == running.copied:
                blocks = running.windows.get(group, blocks)
            whole = blocks[: tokens // manager.block_size - first]
            if any(block.is_null for block in blocks) or not all(b.block_hash for b in whole):
                return None
            needed += [block.block_id for block in blocks]
        return needed

    def _cache_partial(self, running: Running) -> None:
        # Cache the longest prefix first, because a longer entry replaces a shorter one.
        for group, block, tokens in sorted(running.partial, key=lambda entry: -entry[2]):
            self.block_pool.cache_partial_block(
                request=running.request,
                block=block,
                num_tokens=tokens,
                kv_cache_group_id=group,
                block_size=self.single_type_managers[group].block_size,
            )

    def _forget(self, request_id: str) -> None:
        running = self._running.pop(request_id, None)
        if running is not None:
            self._end(running)
        super()._forget(request_id)

    def _end(self, running: Running) -> None:
        request = running.request
        if running.copies:
            if self._snapshots.cache(running):
                answer = self._enter(running, running.copied, CheckpointKind.ANSWER)
                if answer is not None and self.collects_answers:
                    self._finished_answers.append((request, running.copied))
            self._snapshots.release(running)
        if running.prompt_end is not None:
            tokens = len(request.block_hashes) * self._unit
            last_copy = round_down(tokens, self._snapshots.interval)
            answered = last_copy if last_copy > request.num_prompt_tokens else 0
            running.prompt_end.answered = answered
        for checkpoint in (running.prompt_end, running.latest):
            if checkpoint is not None and checkpoint.place in TURN_ENDS:
                checkpoint.end = request.num_tokens
        self._seen.add(request.block_hashes, known=running.prompt_units)
        if running.latest is not None and running.latest.pinned:
            self.checkpoints.touch(running.latest)

    def reset_prefix_cache(self) -> bool:
        if not super().reset_prefix_cache():
            return False
        self.checkpoints.clear()
        self._queue.unpin(self._queue.get_all_free_blocks())
        self._returns = AnswerReturns()
        self._seen = SeenPrefixes(self._seen.capacity)
        return True
