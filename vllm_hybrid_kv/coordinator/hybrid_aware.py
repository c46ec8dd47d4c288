# SPDX-License-Identifier: Apache-2.0
"""The policy `hybrid_aware`: where to keep states, and what to give up first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_coordinator import replay_boundaries
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    KVCacheBlock,
    get_block_hash,
    get_group_id,
)
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import MambaSpec, get_mamba_prefill_checkpoint_position
from vllm.v1.request import Request, RequestStatus

from vllm_hybrid_kv.coordinator.answer_states import USUAL, AnswerStates, Running
from vllm_hybrid_kv.coordinator.checkpoints import Checkpoint, Checkpoints, Place
from vllm_hybrid_kv.coordinator.eviction import CheckpointQueue
from vllm_hybrid_kv.coordinator.fixed_point import FixedPointCoordinator
from vllm_hybrid_kv.coordinator.seen_prefixes import SeenPrefixes

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig

SEEN_LIMITS = (1 << 16, 1 << 22)
"""Bounds of the number of hashes remembered in a generation; 4 bytes each at most."""

STATES_OF_PROMPT = 3
"""Blocks of a group that a prompt may hold while it is computed: the states that a chunk begins and
ends with, and one that is kept. vLLM counts one for a prompt that waits."""


class HybridAwareCoordinator(FixedPointCoordinator):
    """A coordinator for models with states (Mamba, Gated DeltaNet) in cache mode `align`.

    **Where states are kept.** At the end of a prompt, rounded down to the match unit: the next
    turn of a conversation resumes there. At the end of an answer, if answers come back
    (`AnswerStates`). At a branch point, where a prompt leaves one that was seen before, as soon as
    the second request shows it. Those at whole blocks, which vLLM makes beside them, if they are
    worth more than what was given up last; else they are left to be overwritten.

    **What is given up first.** Blocks are free to take once no checkpoint can be resumed at with
    them: attention beyond the last checkpoint, states of no checkpoint, copies of what another
    request has computed too. Then whole checkpoints go, those first that save the least compute
    for their memory (`Checkpoints`).

    **What is as in vLLM.** Who may take a block: only free ones are ever in the queue. What a hit
    is: `FixedPointCoordinator` looks it up in vLLM's own hash map. Copy-on-write of partial
    blocks, preemption, events and connectors are vLLM's code, unchanged.
    """

    def __init__(self, **factory_args: Any) -> None:
        """Make the coordinator.

        Args:
            **factory_args: The arguments of vLLM's factory.
        """
        super().__init__(**factory_args)
        groups = range(len(self.single_type_managers))
        self._state_groups = [
            group for group in groups if isinstance(self.single_type_managers[group], MambaManager)
        ]
        cached = {group for lookup in self.attention_groups for group in lookup.group_ids}
        self._attention_groups = [
            group for group in groups if group in cached and group not in self._state_groups
        ]
        self._state_ids = frozenset(self._state_groups)
        self._unit = self.hash_block_size
        self._alignment = self._cache_hit_alignment_tokens
        self._block_tokens = self.single_type_managers[self._state_groups[0]].block_size
        self.checkpoints = Checkpoints(len(self._state_groups), self._block_tokens)
        hashes = 2 * self.block_pool.num_gpu_blocks * self._block_tokens // self._unit
        self._seen = SeenPrefixes(min(max(hashes, SEEN_LIMITS[0]), SEEN_LIMITS[1]))
        self._running: dict[str, Running] = {}
        self._answers = AnswerStates(
            {group: self.single_type_managers[group] for group in self._state_groups},
            self.block_pool,
            self._alignment,
        )
        self.block_pool.free_block_queue = CheckpointQueue(
            self.block_pool.free_block_queue, self._is_needed_when_free, self._give_up
        )
        # The manager asks the pool, which does not know who needs the blocks.
        self._evict_blocks = self.block_pool.evict_blocks
        self.block_pool.evict_blocks = self.evict_blocks

    @staticmethod
    def suits(kv_cache_config: KVCacheConfig) -> bool:
        """Whether a plan has attention, and states in cache mode `align`, all of them cached."""
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        states = [spec for spec in specs if isinstance(spec, MambaSpec)]
        return 0 < len(states) < len(specs) and all(
            spec.mamba_cache_mode == "align" for spec in states
        )

    def attach(self, kv_cache_manager: KVCacheManager) -> None:
        """Have states cached at branch points inside a block, which vLLM does for EAGLE alone.

        Args:
            kv_cache_manager: The one that made this coordinator; the scheduler asks it.
        """
        super().attach(kv_cache_manager)
        if self.enable_partial_hash_hits and self.num_reprefillable_tokens == 0:
            kv_cache_manager.mamba_shared_prefix_checkpoint = True
            for group in self._state_groups:
                self.single_type_managers[group].shared_prefix_checkpoint = True

    def _is_needed(self, block: KVCacheBlock) -> bool:
        key = block.block_hash
        if key is None or get_group_id(key) not in self._state_ids:
            return self.checkpoints.needs(block.block_id)
        # Of several requests that computed one state at a time, lookups find the first's.
        hash_map = self.block_pool.cached_block_hash_to_block
        return self.checkpoints.keeps(get_block_hash(key)) and hash_map.get_one_block(key) is block

    def _is_needed_when_free(self, block: KVCacheBlock) -> bool:
        if self._is_needed(block):
            return True
        key = block.block_hash
        if key is not None and get_group_id(key) in self._state_ids:
            checkpoint = self.checkpoints.kept_at(get_block_hash(key))
            if checkpoint is not None:
                # Another's is the first now, since this one's entry was moved here from the block
                # that its request went on with. It was not needed so far.
                self._drop_if_gone(checkpoint)
        return False

    def _give_up(self) -> list[KVCacheBlock] | None:
        checkpoint = self.checkpoints.give_up()
        return None if checkpoint is None else self._released(checkpoint)

    def _released(self, checkpoint: Checkpoint) -> list[KVCacheBlock]:
        """Return the blocks that only a checkpoint needed which is not kept any more."""
        blocks = self.block_pool.blocks
        released = [
            blocks[block_id]
            for block_id in checkpoint.blocks
            if not self._is_needed(blocks[block_id])
        ]
        # One by one, for another's state may be gone, after a connector's failure for one.
        for group in self._state_groups:
            released += self.block_pool.get_cached_block(checkpoint.key, [group]) or []
        return released

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Forget what blocks hold, which a connector failed to load, and what cannot do without.

        Args:
            block_ids: Their ids.
        """
        self._evict_blocks(block_ids)
        for checkpoint in self.checkpoints.kept():
            if block_ids.isdisjoint(checkpoint.blocks):
                self._drop_if_gone(checkpoint)
            else:
                self._drop(checkpoint)
        blocks = [self.block_pool.blocks[block_id] for block_id in block_ids]
        self.block_pool.free_block_queue.release(
            [block for block in blocks if not self._is_needed(block)]
        )

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """Find the longest prefix that every group can serve, and where a branch begins.

        Args:
            block_hashes: The request's, one for every hash unit of its tokens.
            max_cache_hit_length: No hit is longer than this many tokens.

        Returns:
            The blocks by group; the number of tokens; and how far behind that the prompt leaves
            those seen before, in tokens. vLLM ends a chunk there and keeps the state.
        """
        blocks, hit, _ = super().find_longest_cache_hit(block_hashes, max_cache_hit_length)
        units = self._seen.longest(block_hashes, max_cache_hit_length // self._unit)
        branch = round_down(units * self._unit, self._alignment)
        if branch <= hit or self._seen.ended(block_hashes[units - 1]):
            return blocks, hit, 0
        return blocks, hit, branch - hit

    def allocate_new_blocks(
        self, request_id: str, *arguments: int, **keywords: int
    ) -> tuple[list[KVCacheBlock], ...]:
        """Allocate blocks for a step of a request. See vLLM's.

        This is also when its states can be copied: they are those after the tokens computed so
        far, which later, with steps scheduled ahead, nobody can tell.
        """
        blocks: tuple[list[KVCacheBlock], ...] = super().allocate_new_blocks(
            request_id, *arguments, **keywords
        )
        running = self._running.get(request_id)
        if running is not None and self._answers.is_time(running.request):
            self._answers.follow(running, len(self._running))
        return blocks

    def get_num_blocks_to_allocate(self, request_id: str, *arguments: Any, **named: Any) -> int:
        """Return how many blocks a step of a request takes. See vLLM's.

        A state that is kept takes a block of each group, for the request to go on with. Where these
        are not free the state is given up, rather than another request.

        When vLLM asks whether the whole prompt of a request that waits would fit, what the prompts
        that are being computed still lack is not free. vLLM lets it begin, and preempts it when
        they come to need it; what it had computed is lost.
        """
        needed: int = super().get_num_blocks_to_allocate(request_id, *arguments, **named)
        if named.get("apply_admission_cap"):
            computed = self._computed()
            if computed:
                own = (STATES_OF_PROMPT - 1) * len(self._state_groups)
                return needed + own + self._lacking(computed)
        pool = self.block_pool
        # More than there are means that it has to wait for the next step, whatever is free.
        if (
            needed > 0
            and pool.get_num_free_blocks() < needed <= pool.num_gpu_blocks
            and self._make_do(request_id)
        ):
            needed = super().get_num_blocks_to_allocate(request_id, *arguments, **named)
        return needed

    def _computed(self) -> list[Request]:
        """Return the requests that take part in steps.

        Those that a connector has loaded into hold blocks too, and wait. Where all that hold some
        do, the next has to begin with what is free, for nobody else will free any.
        """
        requests = [running.request for running in self._running.values()]
        return [request for request in requests if request.status is RequestStatus.RUNNING]

    def _lacking(self, requests: Iterable[Request]) -> int:
        """Return how many blocks those among some requests lack whose prompts are computed."""
        lacking = 0
        for request in requests:
            # One that was preempted computes its answer again, too.
            if request.num_computed_tokens >= max(
                request.num_prompt_tokens, request.num_tokens - 1
            ):
                continue
            for group in self._attention_groups:
                manager = self.single_type_managers[group]
                blocks = -(-request.num_tokens // manager.block_size)
                lacking += max(blocks - len(manager.req_to_blocks[request.request_id]), 0)
            for group in self._state_groups:
                table = self.single_type_managers[group].req_to_blocks[request.request_id]
                held = sum([not block.is_null for block in table])
                lacking += max(STATES_OF_PROMPT - held, 0)
        return lacking

    def _make_do(self, request_id: str) -> bool:
        """Keep fewer states of requests that run; False where none are to be kept."""
        forgone = self._forgo_copies(request_id)
        for running in self._running.values():
            if running.copies:
                self._answers.release(running)
                forgone = True
        return forgone

    def _forgo_copies(self, request_id: str) -> bool:
        """Have a request that runs write over the state that it was to keep; False if none."""
        forgone = False
        keys: set[BlockHash] = set()
        for group in self._state_groups:
            manager = self.single_type_managers[group]
            kept = manager._partial_hit_reqs.get(request_id)
            # One that is about to begin needs a copy of what it hit.
            if kept is None or request_id not in manager._allocated_block_reqs:
                continue
            del manager._partial_hit_reqs[request_id]
            manager._producer_partial_tail_reqs.pop(request_id, None)
            if kept[1].block_hash is not None:
                keys.add(get_block_hash(kept[1].block_hash))
            self.block_pool._maybe_evict_cached_block(kept[1])
            forgone = True
        # It may be another request that entered the checkpoint, with states of its own since gone.
        for key in keys:
            checkpoint = self.checkpoints.kept_at(key)
            if checkpoint is not None:
                self._drop_if_gone(checkpoint)
        return forgone

    def _drop(self, checkpoint: Checkpoint) -> None:
        self.checkpoints.drop(checkpoint)
        self.block_pool.free_block_queue.release(self._released(checkpoint))

    def _drop_if_gone(self, checkpoint: Checkpoint) -> None:
        state = self.block_pool.get_cached_block(checkpoint.key, self._state_groups)
        if state is None:
            self._drop(checkpoint)
        else:
            # What is left may be another request's, which was not needed so far.
            self.block_pool.free_block_queue.retain(state)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Cache a request's blocks, and enter the checkpoints that it has come to.

        Args:
            request: The request.
            num_computed_tokens: Its tokens whose K, V and states are computed when the step is.
        """
        if self._is_inside_a_unit(request, num_computed_tokens):
            return
        self._cache_blocks(request, num_computed_tokens)
        running = self._running.get(request.request_id)
        if running is None:
            running = self._begin(request)
        if running.partial:
            cached = self._num_cached_blocks(request.request_id)
            if cached != running.cached or num_computed_tokens <= request.num_prompt_tokens:
                running.cached = cached
                # vLLM drops a block's entry at a shorter prefix for one at a longer. Attention's
                # pages still hold what it promised.
                self._cache_partial(running)
        units = num_computed_tokens // self._unit
        if units <= running.units:
            return
        running.units = units
        tokens = units * self._unit
        if tokens in self._prompt_ends(request):
            running.prompt_end = self._enter(running, tokens, Place.PROMPT_END)
        elif tokens == request.shared_prefix_boundary:
            self._enter(running, tokens, Place.BRANCH)
        elif tokens % self._block_tokens == tokens % self._alignment == 0:
            self._enter(running, tokens, Place.BOUNDARY)

    def _num_cached_blocks(self, request_id: str) -> int:
        managers = [self.single_type_managers[group] for group in self._attention_groups]
        return sum([manager.num_cached_block.get(request_id, 0) for manager in managers])

    def _prompt_ends(self, request: Request) -> set[int]:
        """Return where the next turn can resume, and with draft layers one that asks again."""
        length = request.num_prompt_tokens
        drafts = bool(self.eagle_group_ids)
        end = get_mamba_prefill_checkpoint_position(length, self._alignment, drafts)
        boundaries = replay_boundaries(length, self.scheduler_block_size, drafts) if drafts else ()
        return {end, *boundaries}

    def _begin(self, request: Request) -> Running:
        hashes = request.block_hashes
        limit = self._seen.longest(hashes, len(hashes))
        if request.num_preemptions:
            # It is no new request, and comes back to what it left itself.
            latest = self.checkpoints.longest(hashes)
        else:
            latest = self.checkpoints.arrive(hashes, limit)
            if latest is not None:
                self._learn_of_answers(latest, limit)
            if 0 < limit < len(hashes):
                self._seen.pass_by(hashes[limit - 1])
            self._seen.add(hashes)
        running = Running(request, 0, len(hashes), latest)
        self._running[request.request_id] = running
        return running

    def _learn_of_answers(self, latest: Checkpoint, limit: int) -> None:
        """Learn whether a turn that came after an answer brought it back.

        Args:
            latest: The longest checkpoint known for its prompt.
            limit: Units of it that were seen before.
        """
        if latest.at is Place.ANSWER and latest.uses == 1:
            self._answers.returns.record(True)
        elif latest.at is Place.PROMPT_END and latest.uses == 1 and latest.answered:
            self._answers.returns.record(limit * self._unit >= latest.answered)

    def _enter(self, running: Running, tokens: int, at: Place) -> Checkpoint | None:
        """Keep a checkpoint of a request, if its states are cached and that pays."""
        request = running.request
        units = tokens // self._unit
        if units > len(request.block_hashes):
            # Where draft layers look ahead, a unit is hashed once the tokens after it are known.
            return None
        key = request.block_hashes[units - 1]
        states = self.block_pool.get_cached_block(key, self._state_groups)
        if states is None:
            return None
        there = self.checkpoints.kept_at(key)
        if there is not None:
            if there.at is not Place.BOUNDARY or at is Place.BOUNDARY:
                return None
            # What it turns out to be says more than that a block ends there.
            self._drop(there)
        blocks = self._attention_blocks(request.request_id, tokens)
        if blocks is None:
            return None
        if at is Place.BOUNDARY:
            parent = running.boundary or running.latest
            checkpoint = self.checkpoints.watch(key, tokens, at, blocks, parent, supersedes=False)
            running.boundary = checkpoint
            if not self.checkpoints.pays(checkpoint):
                return None
        else:
            supersedes = at is not Place.ANSWER or self._answers.returns.rate >= USUAL
            checkpoint = self.checkpoints.watch(key, tokens, at, blocks, running.latest, supersedes)
            running.latest = checkpoint
        self.checkpoints.keep(checkpoint)
        # Another request's, which were not needed so far, may be those that lookups find.
        self.block_pool.free_block_queue.retain(states)
        self._end_inside_blocks(running, tokens)
        return checkpoint

    def _attention_blocks(self, request_id: str, tokens: int) -> list[int] | None:
        """Return the ids of the attention blocks that a hit of a request's first tokens takes.

        None where a window has left some of them behind since, or they were not to be cached there.
        """
        needed: list[int] = []
        for group in self._attention_groups:
            manager = self.single_type_managers[group]
            table = manager.req_to_blocks[request_id]
            first = max(manager.get_num_skipped_tokens(tokens), 0) // manager.block_size
            blocks = table[first : -(-tokens // manager.block_size)]
            whole = blocks[: tokens // manager.block_size - first]
            if any(block.is_null for block in blocks) or not all(b.block_hash for b in whole):
                return None
            needed += [block.block_id for block in blocks]
        return needed

    def _end_inside_blocks(self, running: Running, tokens: int) -> None:
        """Have attention serve a prefix that ends inside a block."""
        for group in self._attention_groups:
            manager = self.single_type_managers[group]
            if tokens % manager.block_size and manager.supports_fine_grained_hash_lookup:
                table = manager.req_to_blocks[running.request.request_id]
                running.partial.append((group, table[tokens // manager.block_size], tokens))
        self._cache_partial(running)

    def _cache_partial(self, running: Running) -> None:
        # The longest first: a longer one would push out what is shorter.
        for group, block, tokens in sorted(running.partial, key=lambda entry: -entry[2]):
            self.block_pool.cache_partial_block(
                request=running.request,
                block=block,
                num_tokens=tokens,
                kv_cache_group_id=group,
                block_size=self.single_type_managers[group].block_size,
            )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Take a request's blocks away from it. See vLLM's."""
        self._end(request_id)
        return super().pop_blocks_for_free(request_id)

    def free(self, request_id: str) -> None:
        """Free a request's blocks. See vLLM's."""
        self._end(request_id)
        super().free(request_id)

    def _end(self, request_id: str) -> None:
        running = self._running.pop(request_id, None)
        if running is None:
            return
        if running.copies:
            if self._answers.finish(running):
                self._enter(running, running.copied, Place.ANSWER)
            self._answers.release(running)
        if running.prompt_end is not None:
            request = running.request
            running.prompt_end.answered = self._answers.last(
                len(request.block_hashes) * self._unit, request.num_prompt_tokens
            )
        self._seen.add(running.request.block_hashes, known=running.prompt_units)
        if running.latest is not None and running.latest.kept:
            self.checkpoints.use_now(running.latest)

    def reset_prefix_cache(self) -> bool:
        """Empty the cache, and forget what was learned of it. See vLLM's."""
        done: bool = super().reset_prefix_cache()
        if done:
            self.checkpoints.clear()
            queue = self.block_pool.free_block_queue
            queue.release(queue.get_all_free_blocks())
            self._answers.clear()
            self._seen.clear()
        return done

    def stats(self) -> dict[str, int]:
        """Return how many checkpoints were kept and given up, by kind."""
        return {**self.checkpoints.counts, "now": len(self.checkpoints)}
