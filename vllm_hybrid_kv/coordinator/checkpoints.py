# SPDX-License-Identifier: Apache-2.0
"""The checkpoints in the cache, what each needs, and which is given up first."""

from __future__ import annotations

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

SUPERSEDED_LIKELY = 0.1
"""How likely anybody returns to a superseded checkpoint, compared with others, until learned."""

WATCHED = 1024
"""Checkpoints that were given up and are still watched, beside three times as many as are kept."""


class Kind(Enum):
    """What is known of a checkpoint beforehand. The chance of a return is learned for each."""

    SHORT = "short prompt"
    PROMPT = "prompt"
    BRANCH = "branch point"
    REUSED = "reused"
    SUPERSEDED = "superseded"


@dataclass(eq=False)
class Checkpoint:
    """A place where a later request can resume: a state and the attention blocks before it.

    Attributes:
        key: The hash of the prefix that it ends.
        tokens: The length of that prefix.
        branch: Whether it is where a second prompt left a first one, not at a prompt's end.
        blocks: Ids of the attention blocks that a hit takes, of all groups.
        parent: The checkpoint that the request which made it resumed at, or made before.
        last_use: When it was made or used last, in requests.
        uses: Requests that resumed here; those that came too late count.
        extensions: Checkpoints in the cache that have this one for parent.
        kept: Whether it is in the cache. One that was given up is watched for a while.
    """

    key: BlockHash
    tokens: int
    branch: bool
    blocks: tuple[int, ...]
    parent: Checkpoint | None
    last_use: int
    uses: int
    extensions: int = 0
    kept: bool = True
    place: int = field(default=-1, repr=False)

    @property
    def superseded(self) -> bool:
        """Whether one request came, and left a longer checkpoint: a conversation that goes on."""
        return self.extensions == 1 and self.uses <= 1 and not self.branch

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
        self._curves = {
            kind: ReuseCurve(SUPERSEDED_LIKELY if kind is Kind.SUPERSEDED else 1.0) for kind in Kind
        }
        self._now = 0
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def keeps(self, key: BlockHash) -> bool:
        """Whether there is a checkpoint at the end of a prefix."""
        checkpoint = self._known.get(key)
        return checkpoint is not None and checkpoint.kept

    def needs(self, block_id: int) -> bool:
        """Whether a checkpoint needs an attention block."""
        return block_id in self._needed

    def kind(self, checkpoint: Checkpoint) -> Kind:
        """Return the kind of a checkpoint, which changes with what happens to it."""
        if checkpoint.superseded:
            return Kind.SUPERSEDED
        if checkpoint.uses > 1:
            return Kind.REUSED
        if checkpoint.branch:
            return Kind.BRANCH
        return Kind.SHORT if checkpoint.tokens <= self._block_tokens else Kind.PROMPT

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
            if longest is None:
                longest = checkpoint
                waited = self._now - checkpoint.last_use
                self._curves[self.kind(checkpoint)].record(waited, True)
            # The longest one may have been given up. It is the longest kept that is used.
            checkpoint.uses += 1
            checkpoint.last_use = self._now
            if checkpoint.kept:
                break
        if self._now % UPDATE_INTERVAL == 0:
            self._learn()
        return longest

    def add(
        self,
        key: BlockHash,
        tokens: int,
        branch: bool,
        blocks: Iterable[int],
        parent: Checkpoint | None,
    ) -> Checkpoint:
        """Enter a checkpoint that is not kept yet.

        Args:
            key: The hash of the prefix that it ends.
            tokens: The length of that prefix.
            branch: Whether it is at a branch point.
            blocks: Ids of the attention blocks that a hit takes.
            parent: A shorter one of the same prefix.
        """
        while parent is not None and parent.tokens >= tokens:
            parent = parent.parent
        checkpoint = self._known.get(key)
        if checkpoint is None:
            # A branch point is known by its second user.
            checkpoint = Checkpoint(
                key, tokens, branch, tuple(blocks), parent, self._now, uses=int(branch)
            )
            self._known[key] = checkpoint
        else:
            checkpoint.blocks, checkpoint.parent = tuple(blocks), parent
            checkpoint.last_use = self._now
            checkpoint.kept = True
        checkpoint.place = len(self._kept)
        self._kept.append(checkpoint)
        self._needed.update(checkpoint.blocks)
        if parent is not None:
            parent.extensions += 1
        self.counts["kept"] += 1
        return checkpoint

    def use_now(self, checkpoint: Checkpoint) -> None:
        """Let a checkpoint's age begin again: the request that made it ended only now."""
        checkpoint.last_use = self._now

    def give_up(self) -> Checkpoint | None:
        """Take out the checkpoint that is worth the least; None where there is none."""
        if not self._kept:
            return None
        kept = self._kept
        drawn = kept if len(kept) <= CANDIDATES else self._draw.sample(kept, CANDIDATES)
        least = min(drawn, key=self._worth)
        self.counts[f"evicted {self.kind(least).value}"] += 1
        if least.uses <= int(least.branch):
            self.counts["evicted unused"] += 1
        self._remove(least)
        return least

    def _worth(self, checkpoint: Checkpoint) -> float:
        fallback = checkpoint.fallback()
        saved = checkpoint.tokens - (0 if fallback is None else fallback.tokens)
        needed = self._needed
        own = sum([needed[block_id] == 1 for block_id in checkpoint.blocks])
        age = age_range(self._now - checkpoint.last_use)
        index = self._curves[self.kind(checkpoint)].index[age]
        return index * saved / (self._state_blocks + own)

    def _remove(self, checkpoint: Checkpoint) -> None:
        checkpoint.kept = False
        last = self._kept.pop()
        if last is not checkpoint:
            self._kept[checkpoint.place] = last
            last.place = checkpoint.place
        for block_id in checkpoint.blocks:
            if self._needed[block_id] == 1:
                del self._needed[block_id]
            else:
                self._needed[block_id] -= 1
        if checkpoint.parent is not None:
            checkpoint.parent.extensions -= 1

    def _learn(self) -> None:
        if self._now % FADE_INTERVAL == 0:
            for curve in self._curves.values():
                curve.fade()
        self._forget()
        waiting: dict[Kind, list[int]] = {kind: [] for kind in Kind}
        for checkpoint in self._known.values():
            waiting[self.kind(checkpoint)].append(self._now - checkpoint.last_use)
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
            age = self._now - checkpoint.last_use
            self._curves[self.kind(checkpoint)].record(age, False)
            del self._known[checkpoint.key]
