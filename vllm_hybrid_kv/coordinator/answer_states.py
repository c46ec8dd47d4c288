# SPDX-License-Identifier: Apache-2.0
"""Keeps the states at the ends of answers, where the next turns of conversations start."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import MambaManager
    from vllm.v1.request import Request

    from vllm_hybrid_kv.coordinator.checkpoints import Checkpoint

INTERVAL = 64
"""Tokens between two copies of a state. A copy reads and writes what a step of decoding does, so
that one in 64 costs little; and linear attention computes in chunks of 64, so that a request which
resumes at such a place is cut as one that starts at 0."""

RARE = 0.25
"""Where fewer answers come back in the next prompt, as those of models that think do not, their
states are not copied."""

USUAL = 0.9
"""Where more of them do, the end of an answer supersedes that of its prompt."""

SHARE = 32
"""At most one block in so many holds copies for requests that still answer."""

PRIOR_RETURNS, PRIOR_TURNS = 2.0, 4.0
FADE = 1024


@dataclass
class Running:
    """What a request with blocks has come to.

    Attributes:
        request: vLLM's.
        units: Hash units that were computed.
        prompt_units: Hash units that were remembered when it began.
        latest: The checkpoint that it resumed at or made last, but for those at whole blocks.
        boundary: The last one of those.
        prompt_end: The one at its prompt's end.
        copies: The blocks of the last copy of its states, one a group, held for it. Or none.
        copied: Tokens whose states these are.
        partial: Group, block and tokens of the checkpoints that end inside a block.
        cached: Whole attention blocks that were cached when these were entered.
    """

    request: Request
    units: int
    prompt_units: int
    latest: Checkpoint | None
    boundary: Checkpoint | None = None
    prompt_end: Checkpoint | None = None
    copies: list[KVCacheBlock] = field(default_factory=list)
    copied: int = 0
    partial: list[tuple[int, KVCacheBlock, int]] = field(default_factory=list)
    cached: int = -1


class AnswerReturns:
    """How often the next turn of a conversation brings the answer back as it was."""

    def __init__(self) -> None:
        """Start with no opinion."""
        self._returns, self._turns = PRIOR_RETURNS, PRIOR_TURNS

    @property
    def rate(self) -> float:
        """The share of answers that came back."""
        return self._returns / self._turns

    def record(self, came_back: bool) -> None:
        """Count a turn that began where an answer had been given."""
        self._returns += came_back
        self._turns += 1
        if self._turns >= FADE:
            self._returns, self._turns = self._returns / 2, self._turns / 2


class AnswerStates:
    """Copies the states of requests while they answer, so that one is there when they end.

    Nobody knows before when that is. So every `INTERVAL` tokens the state is copied, over the copy
    before, into blocks that nothing else is in and that are held for the request. vLLM's own
    copy-on-write carries it out at the start of the step. Copies give way to everything else:
    where memory is scarce compared with the number of requests there are none.
    """

    def __init__(self, managers: dict[int, MambaManager], pool: BlockPool, alignment: int) -> None:
        """Prepare.

        Args:
            managers: Those of the states, by group.
            pool: The pool of blocks.
            alignment: What the lengths of hits are multiples of, in tokens.
        """
        self._managers = managers
        self._pool = pool
        self._interval = math.lcm(INTERVAL, alignment)
        self._most = pool.num_gpu_blocks // SHARE
        # Where hits end at whole blocks vLLM keeps what there is. With draft tokens the state after
        # the accepted ones is in any of several blocks.
        self._possible = all(
            alignment < manager.block_size and manager.num_speculative_blocks == 0
            for manager in managers.values()
        )
        self.returns = AnswerReturns()

    def clear(self) -> None:
        """Forget what was learned."""
        self.returns = AnswerReturns()

    def is_time(self, request: Request) -> bool:
        """Whether the states of a request are to be copied before this step."""
        tokens = request.num_computed_tokens
        return tokens % self._interval == 0 and tokens > request.num_prompt_tokens

    def follow(self, running: Running, requests: int) -> None:
        """Copy the states of a request that answers, when it is time and if there is room.

        To be called before a step, when the request's blocks are allocated: its blocks hold the
        states after all tokens computed so far. Later, with steps scheduled ahead, nobody can tell.

        Args:
            running: The request.
            requests: How many there are.
        """
        request = running.request
        tokens = request.num_computed_tokens
        if not self._possible or self.returns.rate < RARE:
            return
        sources = [self._state(manager, request, tokens) for manager in self._managers.values()]
        if any(block.is_null for block in sources):
            return
        if not running.copies:
            count = len(sources)
            if requests * count > self._most:
                return
            if self._pool.free_block_queue.num_spent < count:
                return
            running.copies = self._pool.get_new_blocks(count)
        running.copied = tokens
        for manager, source, copy in zip(
            self._managers.values(), sources, running.copies, strict=True
        ):
            # vLLM gives these two references back when the step is done.
            source.ref_cnt += 1
            copy.ref_cnt += 1
            manager._pending_cow_copies.append((source, copy))

    def finish(self, running: Running) -> bool:
        """Cache the last copy of a request that ends.

        Args:
            running: One with a copy.

        Returns:
            Whether it is cached. It is not if the request was aborted before the tokens up to there
            were known.
        """
        if running.copied // self._pool.hash_block_size > len(running.request.block_hashes):
            return False
        for (group, manager), copy in zip(self._managers.items(), running.copies, strict=True):
            self._pool.cache_partial_block(
                request=running.request,
                block=copy,
                num_tokens=running.copied,
                kv_cache_group_id=group,
                block_size=manager.block_size,
            )
        return True

    def release(self, running: Running) -> None:
        """Let go of the blocks that were held for a request."""
        copies, running.copies = running.copies, []
        self._pool.free_blocks(copies)

    def last(self, tokens: int, prompt: int) -> int:
        """Return the last place at or before some tokens where states are copied; 0 if none.

        Args:
            tokens: Those of a request, in whole hash units.
            prompt: How many of them are its prompt.
        """
        place = tokens // self._interval * self._interval
        return place if place > prompt else 0

    @staticmethod
    def _state(manager: MambaManager, request: Request, tokens: int) -> KVCacheBlock:
        block: KVCacheBlock = manager.req_to_blocks[request.request_id][
            (tokens - 1) // manager.block_size
        ]
        return block
