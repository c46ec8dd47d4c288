# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in the cache, what each needs, and which is given up first."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from vllm_hybrid_kv.coordinator.reuse import ReuseCurve, age_range

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash

UPDATE_INTERVAL = 64
"""Requests between two computations of the reuse curves."""

FADE_INTERVAL = 8192
"""Requests after which what was learned counts half."""

CANDIDATES = 128
"""Of more checkpoints than this, as many are drawn to find one to give up (as LHD does, NSDI'18):
the time that it takes must not grow with the cache."""

WATCHED = 1024
"""Checkpoints that were given up and are still watched, beside three times as many as are kept."""


PRICE_MEMORY = 0.95
"""The price of a block is an average over about twenty checkpoints that were given up last."""


class Place(Enum):
    """Where in a request a checkpoint is."""

    # There is one object of each. Enum's own hash is that of the name, and takes longer.
    __hash__ = object.__hash__

    PROMPT_END = "prompt end"
    BRANCH = "branch point"
    ANSWER = "answer"
    BOUNDARY = "block boundary"


class Kind(Enum):
    """What is known of a checkpoint beforehand. The chance of a return is learned for each."""

    __hash__ = object.__hash__

    SHORT = "short prompt"
    PROMPT = "prompt"
    BRANCH = "branch point"
    ANSWER = "answer"
    BOUNDARY = "block boundary"
    REUSED = "reused"
    SUPERSEDED = "superseded"


_KINDS = {
    Place.BRANCH: Kind.BRANCH,
    Place.ANSWER: Kind.ANSWER,
    Place.BOUNDARY: Kind.BOUNDARY,
}

LIKELY = {Kind.SUPERSEDED: 0.1, Kind.BOUNDARY: 0.02}
"""How likely anybody returns to a checkpoint, compared with a prompt's end, until learned."""


@dataclass(eq=False)
class Checkpoint:
    """A place where a later request can resume: a state and the attention blocks before it.

    Attributes:
        key: The hash of the prefix that it ends.
        tokens: The length of that prefix.
        at: Where it is.
        blocks: Ids of the attention blocks that a hit takes, of all groups.
        parent: The longest one before it that was kept when it was made, or what that left.
        last_use: When it was made or used last, in requests.
        since: Its age when it became of the kind that it is.
        uses: Requests that resumed here; those that came too late count.
        supersedes: Whether nobody is likely to return to its parent now that there is this one.
        answered: Tokens up to which a state could be kept in the answer that followed it, if any.
        extensions: Checkpoints in the cache that have this one for parent and supersede it.
        kept: Whether it is in the cache. One that was given up is watched for a while.
    """

    key: BlockHash
    tokens: int
    at: Place
    blocks: tuple[int, ...]
    parent: Checkpoint | None
    last_use: int
    uses: int
    since: int = 0
    supersedes: bool = True
    answered: int = 0
    extensions: set[Checkpoint] = field(default_factory=set, repr=False)
    kept: bool = False
    slot: int = field(default=-1, repr=False)

    @property
    def superseded(self) -> bool:
        """Whether one request came, and left a longer checkpoint: a conversation that goes on."""
        ends = self.at in (Place.PROMPT_END, Place.ANSWER)
        return ends and len(self.extensions) == 1 and self.uses <= 1

    def fallback(self) -> Checkpoint | None:
        """Return the longest kept checkpoint before this one, but for those that it superseded."""
        checkpoint = self.parent
        while checkpoint is not None and (not checkpoint.kept or checkpoint.superseded):
            checkpoint = checkpoint.parent
        return checkpoint


class Checkpoints:
    """The checkpoints of one cache.

    Which one to give up: the one that saves the least compute for its memory, which is

        index(kind, age) x (tokens - tokens of its fallback) / blocks that only it needs

    with the index of `ReuseCurve`. That is tokens of prefill saved per block and request. In the
    terms of Marconi (arXiv 2411.19379) it is FLOP efficiency with learned recency; in those of
    LHD (NSDI'18), hit density.
    """

    def __init__(self, state_blocks: int, block_tokens: int) -> None:
        """Start with none.

        Args:
            state_blocks: The blocks that one state takes in all groups.
            block_tokens: A prompt that fits into one block of so many tokens is `Kind.SHORT`.
        """
        self._state_blocks = state_blocks
        self._block_tokens = block_tokens
        self._draw = random.Random(0)
        self.clear()

    def clear(self) -> None:
        """Forget all, and what was learned."""
        self._known: dict[BlockHash, Checkpoint] = {}
        self._kept: list[Checkpoint] = []
        self._needed: Counter[int] = Counter()
        self._curves = {kind: ReuseCurve(LIKELY.get(kind, 1.0)) for kind in Kind}
        self._now = 0
        self._price = 0.0
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def keeps(self, key: BlockHash) -> bool:
        """Whether there is a checkpoint at the end of a prefix."""
        return self.kept_at(key) is not None

    def kept(self) -> tuple[Checkpoint, ...]:
        """Return all checkpoints in the cache."""
        return tuple(self._kept)

    def kept_at(self, key: BlockHash) -> Checkpoint | None:
        """Return the checkpoint that is kept at the end of a prefix."""
        checkpoint = self._known.get(key)
        return checkpoint if checkpoint is not None and checkpoint.kept else None

    def needs(self, block_id: int) -> bool:
        """Whether a checkpoint needs an attention block."""
        return block_id in self._needed

    def kind(self, checkpoint: Checkpoint) -> Kind:
        """Return the kind of a checkpoint, which changes with what happens to it."""
        if checkpoint.superseded:
            return Kind.SUPERSEDED
        if checkpoint.uses > 1:
            return Kind.REUSED
        if checkpoint.at is Place.PROMPT_END:
            return Kind.SHORT if checkpoint.tokens <= self._block_tokens else Kind.PROMPT
        return _KINDS[checkpoint.at]

    def longest(self, hashes: Sequence[BlockHash]) -> Checkpoint | None:
        """Return the longest checkpoint known for a prefix, kept or not."""
        known = (self._known.get(key) for key in reversed(hashes))
        return next((checkpoint for checkpoint in known if checkpoint is not None), None)

    def arrive(self, hashes: Sequence[BlockHash], limit: int) -> Checkpoint | None:
        """Count a request.

        Args:
            hashes: Its prompt's.
            limit: How many of them are worth looking at: no checkpoint is at a later one.

        Returns:
            The longest checkpoint known for its prompt, kept or not.
        """
        self._now += 1
        longest = None
        for place in range(min(limit, len(hashes)) - 1, -1, -1):
            checkpoint = self._known.get(hashes[place])
            if checkpoint is None:
                continue
            longest = longest or checkpoint
            # The longest one may have been given up. It is the longest kept that is used, and the
            # request came for all that are longer as well. The ends of blocks are on the way to
            # any of them, and count only where there is nothing further on.
            returned = checkpoint is longest or checkpoint.at is not Place.BOUNDARY
            if checkpoint.kept:
                self.counts[f"used {self.kind(checkpoint).value}"] += 1
            self._settle(checkpoint, returned)
            checkpoint.uses += 1
            self.use_now(checkpoint)
            if checkpoint.kept:
                break
        if self._now % UPDATE_INTERVAL == 0:
            self._learn()
        return longest

    def watch(
        self,
        key: BlockHash,
        tokens: int,
        at: Place,
        blocks: Iterable[int],
        parent: Checkpoint | None,
        supersedes: bool = True,
    ) -> Checkpoint:
        """Enter a checkpoint that could be kept, to learn whether anybody returns to it.

        Args:
            key: The hash of the prefix that it ends.
            tokens: The length of that prefix.
            at: Where in a request it is.
            blocks: Ids of the attention blocks that a hit takes.
            parent: A shorter one of the same prefix.
            supersedes: Whether nobody is likely to return to the parent once this one is kept.

        Returns:
            It, or the one that is known for the same prefix, with these blocks.
        """
        while parent is not None and (parent.tokens >= tokens or not parent.kept):
            parent = parent.parent
        checkpoint = self._known.get(key)
        if checkpoint is None:
            # A branch point is known by its second user.
            uses = int(at is Place.BRANCH)
            checkpoint = Checkpoint(key, tokens, at, (), parent, self._now, uses)
            self._known[key] = checkpoint
        if not checkpoint.kept:
            checkpoint.at, checkpoint.parent, checkpoint.supersedes = at, parent, supersedes
            checkpoint.uses = max(checkpoint.uses, int(at is Place.BRANCH))
            checkpoint.blocks = tuple(blocks)
            self.use_now(checkpoint)
        return checkpoint

    def pays(self, checkpoint: Checkpoint) -> bool:
        """Whether one that is not kept is worth more than those that were given up last."""
        return self._worth(checkpoint) >= self._price

    def keep(self, checkpoint: Checkpoint) -> None:
        """Have a checkpoint that is watched in the cache."""
        checkpoint.kept = True
        checkpoint.slot = len(self._kept)
        self._kept.append(checkpoint)
        self._needed.update(checkpoint.blocks)
        self._extend(checkpoint)
        self.counts[f"kept {self.kind(checkpoint).value}"] += 1

    def use_now(self, checkpoint: Checkpoint) -> None:
        """Let a checkpoint's age begin again: the request that made it ended only now."""
        checkpoint.last_use, checkpoint.since = self._now, 0

    def give_up(self) -> Checkpoint | None:
        """Take out the checkpoint that is worth the least; None where there is none."""
        if not self._kept:
            return None
        kept = self._kept
        drawn = kept if len(kept) <= CANDIDATES else self._draw.sample(kept, CANDIDATES)
        worth, least = self._least(drawn)
        self._price = PRICE_MEMORY * self._price + (1 - PRICE_MEMORY) * worth
        self.counts[f"evicted {self.kind(least).value}"] += 1
        if least.uses <= int(least.at is Place.BRANCH):
            self.counts["evicted unused"] += 1
        self.drop(least)
        return least

    def _least(self, checkpoints: Iterable[Checkpoint]) -> tuple[float, Checkpoint]:
        """Return the worth of the one that is worth the least, and it."""
        worth, least = math.inf, None
        for one in checkpoints:
            saving = self._saving(one)
            # If no other needed any of its blocks. With others it is worth more, and counting them
            # is what takes the time.
            if least is not None and saving / (self._state_blocks + len(one.blocks)) > worth:
                continue
            its = saving / (self._state_blocks + self._own(one))
            if least is None or its < worth or (its == worth and one.slot < least.slot):
                worth, least = its, one
        assert least is not None
        return worth, least

    def _worth(self, checkpoint: Checkpoint) -> float:
        return self._saving(checkpoint) / (self._state_blocks + self._own(checkpoint))

    def _saving(self, checkpoint: Checkpoint) -> float:
        """Return the tokens of prefill that a checkpoint saves by request that comes."""
        fallback = checkpoint.fallback()
        saved = checkpoint.tokens - (0 if fallback is None else fallback.tokens)
        age = age_range(self._now - checkpoint.last_use)
        return self._curves[self.kind(checkpoint)].index[age] * saved

    def _own(self, checkpoint: Checkpoint) -> int:
        """Return how many of its attention blocks no other kept checkpoint needs."""
        needed = self._needed
        alone = int(checkpoint.kept)
        return sum([needed[block_id] == alone for block_id in checkpoint.blocks])

    def drop(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint no more. It is watched on."""
        checkpoint.kept = False
        last = self._kept.pop()
        if last is not checkpoint:
            self._kept[checkpoint.slot] = last
            last.slot = checkpoint.slot
        self._release(checkpoint.blocks)
        parent = checkpoint.parent
        if parent is not None and checkpoint in parent.extensions:
            self._settle(parent, returned=False)
            parent.extensions.remove(checkpoint)
        # What it was superseded by supersedes what it had superseded.
        for longer in checkpoint.extensions:
            longer.parent = parent
            self._extend(longer)
        checkpoint.extensions.clear()

    def _extend(self, checkpoint: Checkpoint) -> None:
        """Enter a checkpoint that is kept with the one that it supersedes."""
        parent = checkpoint.parent
        if parent is not None and checkpoint.supersedes:
            # Its kind may change. Its wait so far was that of one of the old.
            self._settle(parent, returned=False)
            parent.extensions.add(checkpoint)

    def _settle(self, checkpoint: Checkpoint, returned: bool) -> None:
        age = self._now - checkpoint.last_use
        self._curves[self.kind(checkpoint)].record(checkpoint.since, age, returned)
        checkpoint.since = age

    def _release(self, blocks: Iterable[int]) -> None:
        for block_id in blocks:
            if self._needed[block_id] == 1:
                del self._needed[block_id]
            else:
                self._needed[block_id] -= 1

    def _learn(self) -> None:
        if self._now % FADE_INTERVAL == 0:
            for curve in self._curves.values():
                curve.fade()
        self._forget()
        waiting: dict[Kind, list[tuple[int, int]]] = {kind: [] for kind in Kind}
        for checkpoint in self._known.values():
            age = self._now - checkpoint.last_use
            waiting[self.kind(checkpoint)].append((checkpoint.since, age))
        for kind, curve in self._curves.items():
            curve.update(waiting[kind])

    def _forget(self) -> None:
        """Stop watching the checkpoints that were given up and not asked for the longest."""
        excess = len(self._known) - 4 * len(self._kept) - WATCHED
        if excess <= 0:
            return
        gone = [checkpoint for checkpoint in self._known.values() if not checkpoint.kept]
        gone.sort(key=lambda checkpoint: checkpoint.last_use)
        for checkpoint in gone[: excess + len(gone) // 8]:
            self._settle(checkpoint, returned=False)
            del self._known[checkpoint.key]
