# SPDX-License-Identifier: Apache-2.0
"""Explains the length of a request's cache hit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(Enum):
    """Why a hit was not longer."""

    NOT_READ = "the request does not read the prefix cache"
    TOO_SHORT = "the prompt is shorter than the match unit"
    LAST_TOKEN = "a longer hit is impossible"
    NOT_CACHED = "nothing longer was cached"
    LIMITED = "KV groups of one kind could not serve what others could"


@dataclass(frozen=True)
class KindHit:
    """How the groups of one kind affected a hit.

    Attributes:
        name: vLLM's name of the kind, with the suffix `_draft` if its groups have draft layers.
        draft: Whether its groups include draft layers.
        alone_tokens: The longest prefix that its groups could serve without the other kinds. None
            if neither metrics nor DEBUG lines are on, because then it is not looked up.
        lost_tokens: By how many tokens its groups shortened the hit.
    """

    name: str
    draft: bool
    alone_tokens: int | None
    lost_tokens: int


@dataclass(frozen=True)
class Explanation:
    """Why a request's cache hit was not longer. `str()` returns it as one sentence.

    Attributes:
        scheduled: Whether this describes the lookup with which the request was scheduled.
            Otherwise, it describes a new lookup that `explain` made.
        preempted: Whether the request was preempted before.
        prompt_tokens: Tokens that were looked up: the prompt and, after a preemption, the output
            up to then.
        unit_tokens: Hits are multiples of this many tokens.
        hit_tokens: Tokens read from the cache, without those that a KV connector loads.
        reach_tokens: The longest prefix that full attention alone could serve. If there is no
            full-attention group, the longest prefix that any kind alone could serve.
        setting: A setting that may lengthen hits, or None.
    """

    request_id: str
    scheduled: bool
    preempted: bool
    prompt_tokens: int
    unit_tokens: int
    hit_tokens: int
    reach_tokens: int
    kinds: tuple[KindHit, ...]
    reason: Reason
    setting: str | None

    @property
    def lost_tokens(self) -> int:
        """Cached tokens that were not hit because some kind of group could not serve them."""
        return sum(kind.lost_tokens for kind in self.kinds)

    @property
    def limited_by(self) -> str | None:
        """The kind that lost the most tokens, or None if no kind lost any."""
        worst = max(self.kinds, key=lambda kind: kind.lost_tokens)
        return worst.name if worst.lost_tokens else None

    def __str__(self) -> str:
        verb = "hit" if self.scheduled else "would hit"
        tokens = "tokens after a preemption" if self.preempted else "prompt tokens"
        why = self.reason.value
        if self.reason in (Reason.TOO_SHORT, Reason.LAST_TOKEN):
            why += (
                f", because hits end at multiples of {self.unit_tokens} tokens "
                "and before the last token"
            )
        elif self.reason is Reason.LIMITED:
            known = [kind for kind in self.kinds if kind.alone_tokens is not None]
            prefixes = ", ".join(f"{kind.name} {kind.alone_tokens}" for kind in known)
            losers = [kind for kind in self.kinds if kind.lost_tokens]
            lost = ", ".join(f"{kind.name} lost {kind.lost_tokens}" for kind in losers)
            why = f"longest prefix of each kind alone: {prefixes}; {lost}"
        advice = f"; try {self.setting}" if self.setting else ""
        return (
            f"request {self.request_id} {verb} {self.hit_tokens} of {self.prompt_tokens} {tokens}: "
            f"{why}{advice}"
        )
