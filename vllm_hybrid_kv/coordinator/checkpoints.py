# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a cache: which blocks they pin, and which checkpoint is evicted first."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from vllm.v1.core.kv_cache_utils import BlockHash

from vllm_hybrid_kv.coordinator.traffic import ReuseCurve, Turn, age_range

UPDATE_INTERVAL = 64
"""After this many requests, the reuse curves are updated."""

FADE_INTERVAL = 8192
"""After this many requests, all earlier observations count half."""

CANDIDATES = 128
"""An eviction compares this many random checkpoints, to bound its time, as in LHD (NSDI'18)."""

TRACKED = 4096
"""Evicted checkpoints that stay tracked: at most this number plus three per pinned checkpoint."""

PRICE_DECAY = 0.95
"""The price of a block is a moving average of what evicted checkpoints were worth. Each eviction
keeps this share of the old price, so about the last 20 evictions count."""


class CheckpointKind(Enum):
    """Where a checkpoint is, or how it was used. Each kind learns its own probability of reuse."""

    # Members are singletons, so the object's hash suffices. Enum hashes names, which is slower.
    __hash__ = object.__hash__

    SHORT = "short prompt"
    PROMPT = "prompt"
    BRANCH = "branch point"
    ANSWER = "answer"
    BOUNDARY = "block boundary"
    REUSED = "reused"
    SUPERSEDED = "superseded"


PRIOR = {CheckpointKind.SUPERSEDED: 0.1, CheckpointKind.BOUNDARY: 0.02}
"""The factors on the prior return rate of these kinds. Other kinds have a factor of 1."""


@dataclass(eq=False)
class Checkpoint:
    """A prefix after which a later request can resume, with the state and attention blocks for it.

    Attributes:
        key: The hash of the prefix that ends here.
        place: The kind that it was registered with. `kind` is its current kind.
        blocks: Ids of the attention blocks, over all groups, that a hit needs.
        parent: The longest checkpoint of a shorter prefix that was pinned at registration.
        last_use: When it was registered or used last, counted in requests.
        uses: Requests that resumed here, or would have if it had not been evicted.
        turn: How the prompt of its request continued a conversation, if a prompt or an answer ends
            here. Otherwise `FIRST`.
        since: The age, in requests, up to which a reuse curve has recorded it.
        supersedes: Whether reuse of its parent is unlikely while this checkpoint is pinned.
        answered: If a prompt ends here, the tokens of the prompt and its answer up to the last
            position where the state could be copied; 0 if the answer was too short for a copy.
        end: The tokens of the prompt and its answer, after its last request has ended; otherwise 0.
        extensions: The pinned checkpoints that supersede this one.
        pinned: Whether it is in the cache. Evicted checkpoints are tracked for a while.
        slot: Its index in the list of pinned checkpoints.
        prefix: The hashes of the whole blocks before its end. Set only with host memory.
    """

    key: BlockHash
    tokens: int
    place: CheckpointKind
    blocks: tuple[int, ...]
    parent: Checkpoint | None
    last_use: int
    uses: int
    turn: Turn = Turn.FIRST
    since: int = 0
    supersedes: bool = True
    answered: int = 0
    end: int = 0
    extensions: set[Checkpoint] = field(default_factory=set, repr=False)
    pinned: bool = False
    slot: int = field(default=-1, repr=False)
    prefix: tuple[BlockHash, ...] = field(default=(), repr=False)

    @property
    def superseded(self) -> bool:
        """Whether one request continued from here to a longer checkpoint, as in a conversation."""
        return (
            len(self.extensions) == 1
            and self.uses <= 1
            and self.place not in (CheckpointKind.BRANCH, CheckpointKind.BOUNDARY)
        )

    @property
    def kind(self) -> CheckpointKind:
        """The current kind: `place`, unless the checkpoint was superseded or reused since."""
        if self.superseded:
            return CheckpointKind.SUPERSEDED
        return CheckpointKind.REUSED if self.uses > 1 else self.place

    def fallback(self) -> Checkpoint | None:
        """Return where a request would resume if this were evicted; None if it would start at 0."""
        checkpoint = self.parent
        while checkpoint is not None and (not checkpoint.pinned or checkpoint.superseded):
            checkpoint = checkpoint.parent
        return checkpoint


class Checkpoints:
    """The checkpoints of one cache.

    Eviction takes the checkpoint that saves the least compute for its memory:

        index(kind, turn, age) x (tokens - tokens of its fallback) / blocks that only it needs

    `index` is that of `ReuseCurve`. The result is in tokens of prefill saved per block and request.
    Marconi (arXiv 2411.19379) would call it FLOP efficiency with learned recency, and LHD (NSDI'18)
    hit density.
    """

    def __init__(self, state_blocks: int, block_tokens: int) -> None:
        """Start without checkpoints.

        The states of a checkpoint take `state_blocks` blocks of `block_tokens` tokens each.
        """
        self._state_blocks = state_blocks
        self._block_tokens = block_tokens
        self._random = random.Random(0)
        self.counts: Counter[tuple[str, str | None]] = Counter()
        """How often each event occurred, by event and kind of checkpoint."""
        self.is_stored: Callable[[Checkpoint], bool] = lambda _: False
        """Whether host memory has a copy of a checkpoint."""
        self.clear()

    def clear(self) -> None:
        """Forget all checkpoints and everything that was learned."""
        self._tracked: dict[BlockHash, Checkpoint] = {}
        self.pinned: list[Checkpoint] = []
        self.outgoing: dict[Checkpoint, None] = {}
        """The pinned checkpoints that were handed to host memory. They are evicted first."""
        self.pins: Counter[int] = Counter()
        """How many pinned checkpoints need each attention block, by the block's id."""
        self._curves = {kind: ReuseCurve(PRIOR.get(kind, 1.0)) for kind in CheckpointKind}
        self._now = 0
        self._price = 0.0

    def pinned_at(self, key: BlockHash) -> Checkpoint | None:
        """Return the checkpoint that is pinned at the end of a prefix, or None."""
        checkpoint = self._tracked.get(key)
        return checkpoint if checkpoint is not None and checkpoint.pinned else None

    def longest(self, hashes: Sequence[BlockHash]) -> Checkpoint | None:
        """Return the longest tracked checkpoint (pinned or not) of a prompt with these hashes."""
        tracked = (self._tracked.get(key) for key in reversed(hashes))
        return next((checkpoint for checkpoint in tracked if checkpoint is not None), None)

    def arrive(self, hashes: Sequence[BlockHash], limit: int) -> Checkpoint | None:
        """Record a new request, and return the longest tracked checkpoint of its prompt.

        Only the first `limit` hashes are looked up.
        """
        self._now += 1
        longest = None
        for index in range(min(limit, len(hashes)) - 1, -1, -1):
            checkpoint = self._tracked.get(hashes[index])
            if checkpoint is None:
                continue
            longest = longest or checkpoint
            # The request resumes at the longest pinned checkpoint. Longer evicted checkpoints
            # count as used too, because the request could have resumed there. A block boundary
            # counts only if it is the longest, because prompts pass boundaries on their way.
            returned = checkpoint is longest or checkpoint.place is not CheckpointKind.BOUNDARY
            if checkpoint.pinned:
                self.counts["used", checkpoint.kind.value] += 1
            self._record(checkpoint, returned)
            checkpoint.uses += 1
            self.touch(checkpoint)
            if checkpoint.pinned:
                break
        if self._now % UPDATE_INTERVAL == 0:
            self._learn()
        return longest

    def enter(
        self,
        key: BlockHash,
        tokens: int,
        place: CheckpointKind,
        blocks: Iterable[int] | None,
        parent: Checkpoint | None,
        supersedes: bool = True,
        turn: Turn = Turn.FIRST,
    ) -> tuple[Checkpoint | None, tuple[int, ...] | None]:
        """Track a checkpoint. Pin it, unless it is a block boundary that is worth too little.

        A checkpoint that is already pinned at this prefix stays, unless it is a block boundary and
        the new one is not. Block boundaries predict reuse worse than all other kinds.

        Args:
            key: The hash of the prefix that ends there.
            tokens: The length of that prefix.
            place: `PROMPT`, `BRANCH`, `ANSWER` or `BOUNDARY`.
            blocks: Ids of the attention blocks that a hit needs, or None if they are not cached.
            parent: A checkpoint of the same request, pinned or not.
            supersedes: Whether reuse of the parent is unlikely once this one is pinned.
            turn: How the request's prompt continues a conversation.

        Returns:
            The new checkpoint, or None if nothing was entered; and the attention blocks of a block
            boundary that the call unpinned, or None if it unpinned nothing.
        """
        released = None
        pinned = self.pinned_at(key)
        if pinned is not None:
            if pinned.place is not CheckpointKind.BOUNDARY or place is CheckpointKind.BOUNDARY:
                return None, None
            self.unpin(pinned)
            released = pinned.blocks
        if blocks is None:
            return None, released
        while parent is not None and (parent.tokens >= tokens or not parent.pinned):
            parent = parent.parent
        if place is CheckpointKind.PROMPT and tokens <= self._block_tokens:
            place = CheckpointKind.SHORT
        # The second request that reaches a branch point reveals it, which counts as a use.
        uses = int(place is CheckpointKind.BRANCH)
        checkpoint = self._tracked.get(key)
        if checkpoint is None:
            checkpoint = Checkpoint(key, tokens, place, (), parent, self._now, uses)
            self._tracked[key] = checkpoint
        checkpoint.place, checkpoint.parent, checkpoint.supersedes = place, parent, supersedes
        checkpoint.uses = max(checkpoint.uses, uses)
        checkpoint.blocks = tuple(blocks)
        # Every turn of a conversation passes its branch points and block boundaries.
        passed = place in (CheckpointKind.BRANCH, CheckpointKind.BOUNDARY)
        checkpoint.turn = Turn.FIRST if passed else turn
        self.touch(checkpoint)
        if place is not CheckpointKind.BOUNDARY or self._worth(checkpoint) >= self._price:
            checkpoint.pinned = True
            checkpoint.slot = len(self.pinned)
            self.pinned.append(checkpoint)
            self.pins.update(checkpoint.blocks)
            if supersedes:
                self._supersede(checkpoint, checkpoint)
            self.counts["kept", checkpoint.kind.value] += 1
        return checkpoint, released

    def age(self, checkpoint: Checkpoint) -> int:
        """Return how many requests have arrived since a checkpoint was used."""
        return self._now - checkpoint.last_use

    def adopt(self, other: Checkpoint, age: int, blocks: Iterable[int]) -> tuple[int, ...]:
        """Pin a copy of a checkpoint that is pinned in another memory, and has an age there.

        `blocks` are the ids of its attention blocks here. Return the attention blocks of a block
        boundary that the call unpinned.
        """
        place = CheckpointKind.PROMPT if other.place is CheckpointKind.SHORT else other.place
        parent = other.parent
        while parent is not None and self.pinned_at(parent.key) is None:
            parent = parent.parent
        checkpoint, released = self.enter(
            other.key,
            other.tokens,
            place,
            blocks,
            None if parent is None else self.pinned_at(parent.key),
            other.supersedes,
            other.turn,
        )
        if checkpoint is not None:
            checkpoint.uses = max(checkpoint.uses, other.uses)
            checkpoint.last_use, checkpoint.since = self._now - age, age
        return released or ()

    def touch(self, checkpoint: Checkpoint) -> None:
        """Set the age of a checkpoint to 0, because it was used."""
        checkpoint.last_use, checkpoint.since = self._now, 0
        self.outgoing.pop(checkpoint, None)

    def evict(self) -> Checkpoint | None:
        """Unpin and return the checkpoint that is worth the least, or None if none is pinned."""
        stored = [checkpoint for checkpoint in self.outgoing if self.is_stored(checkpoint)]
        least, worth = self._least(stored or self.pinned)
        if least is None:
            return None
        self._price = PRICE_DECAY * self._price + (1 - PRICE_DECAY) * worth
        self.counts["evicted", least.kind.value] += 1
        if least.uses <= int(least.place is CheckpointKind.BRANCH):
            self.counts["evicted_unused", None] += 1
        self.unpin(least)
        return least

    def next_outgoing(self, can_leave: Callable[[Checkpoint], bool]) -> Checkpoint | None:
        """Return the checkpoint that is worth the least of those that can leave, or None.

        It is the next to be copied to host memory, and will be evicted once it is there.
        """
        least, _ = self._least(self.pinned, lambda one: one not in self.outgoing and can_leave(one))
        if least is not None:
            self.outgoing[least] = None
        return least

    def _least(
        self, candidates: Sequence[Checkpoint], allowed: Callable[[Checkpoint], bool] | None = None
    ) -> tuple[Checkpoint | None, float]:
        """Return the candidate that is worth the least, and its worth."""
        if len(candidates) > CANDIDATES:
            candidates = self._random.sample(candidates, CANDIDATES)
        least, lowest = None, math.inf
        for checkpoint in candidates:
            if allowed is not None and not allowed(checkpoint):
                continue
            worth = self._worth(checkpoint, lowest)
            if (
                least is None
                or worth < lowest
                or (worth == lowest and checkpoint.slot < least.slot)
            ):
                lowest, least = worth, checkpoint
        return least, lowest

    def _worth(self, checkpoint: Checkpoint, limit: float = math.inf) -> float:
        """Return the expected tokens of prefill saved per block and arriving request.

        May return a lower bound instead if that already exceeds `limit`.
        """
        fallback = checkpoint.fallback()
        saved = checkpoint.tokens - (0 if fallback is None else fallback.tokens)
        age = age_range(self._now - checkpoint.last_use)
        saving = self._curves[checkpoint.kind].index[checkpoint.turn][age] * saved
        # Finding the shared blocks is slow, so first count all blocks: this is a lower bound.
        bound = saving / (self._state_blocks + len(checkpoint.blocks))
        if bound > limit:
            return bound
        return saving / self.own_blocks(checkpoint)

    def own_blocks(self, checkpoint: Checkpoint) -> int:
        """Return how many blocks only this checkpoint needs: its states and attention blocks."""
        pins, alone = self.pins, int(checkpoint.pinned)
        own = sum([pins[block_id] == alone for block_id in checkpoint.blocks])
        return self._state_blocks + own

    def unpin(self, checkpoint: Checkpoint) -> None:
        """Remove a checkpoint from the cache, and continue to track it."""
        checkpoint.pinned = False
        self.outgoing.pop(checkpoint, None)
        last = self.pinned.pop()
        if last is not checkpoint:
            self.pinned[checkpoint.slot] = last
            last.slot = checkpoint.slot
        for block_id in checkpoint.blocks:
            if self.pins[block_id] == 1:
                del self.pins[block_id]
            else:
                self.pins[block_id] -= 1
        for ancestor in self._ancestors(checkpoint):
            if checkpoint in ancestor.extensions:
                self._record(ancestor, returned=False)
                ancestor.extensions.remove(checkpoint)
        # The extensions of the unpinned checkpoint now supersede its parent instead.
        for longer in checkpoint.extensions:
            if longer.parent is checkpoint:
                longer.parent = checkpoint.parent
            self._supersede(checkpoint, longer)
        checkpoint.extensions.clear()

    @staticmethod
    def _ancestors(checkpoint: Checkpoint) -> Iterator[Checkpoint]:
        while (parent := checkpoint.parent) is not None:
            yield parent
            checkpoint = parent

    def _supersede(self, checkpoint: Checkpoint, longer: Checkpoint) -> None:
        """Add `longer` to the extensions of the pinned ancestors of a checkpoint.

        Stop at an ancestor that supersedes its parent, because the parent's kind does not change.
        An answer that does not supersede its prompt is no such ancestor: the next turn after it
        supersedes both.
        """
        for ancestor in self._ancestors(checkpoint):
            if ancestor.pinned:
                # The ancestor's kind may change, so record its time without use for the old kind.
                self._record(ancestor, returned=False)
                ancestor.extensions.add(longer)
                if ancestor.supersedes:
                    break

    def _record(self, checkpoint: Checkpoint, returned: bool) -> None:
        age = self._now - checkpoint.last_use
        self._curves[checkpoint.kind].record(checkpoint.turn, checkpoint.since, age, returned)
        checkpoint.since = age

    def _learn(self) -> None:
        if self._now % FADE_INTERVAL == 0:
            for curve in self._curves.values():
                curve.fade()
        self._forget()
        waiting: defaultdict[CheckpointKind, list[tuple[Turn, int, int]]] = defaultdict(list)
        for checkpoint in self._tracked.values():
            age = self._now - checkpoint.last_use
            waiting[checkpoint.kind].append((checkpoint.turn, checkpoint.since, age))
        for kind, curve in self._curves.items():
            curve.update(waiting[kind])

    def _forget(self) -> None:
        """Stop tracking the evicted checkpoints that were unused for the longest time."""
        excess = len(self._tracked) - 4 * len(self.pinned) - TRACKED
        if excess <= 0:
            return
        evicted = [checkpoint for checkpoint in self._tracked.values() if not checkpoint.pinned]
        evicted.sort(key=lambda checkpoint: checkpoint.last_use)
        for checkpoint in evicted[: excess + len(evicted) // 8]:
            self._record(checkpoint, returned=False)
            del self._tracked[checkpoint.key]
