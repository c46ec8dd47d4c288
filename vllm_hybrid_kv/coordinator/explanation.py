# SPDX-License-Identifier: Apache-2.0
"""Why a request hit what it hit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpecKind, get_kv_cache_spec_kind

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_coordinator import SpecGroup

DRAFT = "_draft"
"""What the name of a kind ends in where draft layers (EAGLE, MTP) are among its groups."""

MAMBA = KVCacheSpecKind.MAMBA.value


class Reason(Enum):
    """What kept a hit from being longer."""

    NOT_READ = "the request does not read the prefix cache"
    TOO_SHORT = "the prompt is shorter than what hits end at"
    LAST_TOKEN = "no longer hit is possible"
    NOT_CACHED = "nothing longer was cached"
    LIMITED = "groups of one kind could not serve what others could"


@dataclass(frozen=True)
class Kind:
    """One kind of KV group of a coordinator.

    Attributes:
        name: What vLLM calls it, with `_draft` behind where draft layers are among its groups.
        groups: The places of its groups in the coordinator's `attention_groups`.
        full_attention: Whether all tokens before the next one are attended to.
    """

    name: str
    groups: tuple[int, ...]
    full_attention: bool

    @property
    def draft(self) -> bool:
        """Whether draft layers are among its groups."""
        return self.name.endswith(DRAFT)


@dataclass(frozen=True)
class KindHit:
    """What the groups of one kind had to do with a hit.

    Attributes:
        name: See `Kind`.
        draft: Whether draft layers are among its groups.
        alone_tokens: The longest prefix that they could have served had there been no others.
            None where that was not looked up, for nobody wanted metrics or DEBUG lines.
        lost_tokens: By how many tokens they made the hit shorter, of those that could be served.
    """

    name: str
    draft: bool
    alone_tokens: int | None
    lost_tokens: int


@dataclass(frozen=True)
class Explanation:
    """Why a request hit what it hit. As text, one sentence.

    Attributes:
        request_id: The request's.
        scheduled: Whether this is what was found when the request was scheduled. Else it is what
            would be found now.
        preempted: Whether it had been preempted before.
        prompt_tokens: Its tokens that were looked up: the prompt's and, after a preemption, those
            of its answer up to then.
        unit_tokens: Hits have a multiple of this many tokens.
        hit_tokens: Those that come from the cache. What a KV connector loads is not among them.
        reach_tokens: What full attention alone could have served: what is cached of the prompt.
            Without full attention, what the kind could that could serve most.
        kinds: By kind of KV group.
        limited_by: The kind that lost the most of what could be served, if one did.
        reason: What kept the hit from being longer.
        setting: What may help, where a setting may.
    """

    request_id: str
    scheduled: bool
    preempted: bool
    prompt_tokens: int
    unit_tokens: int
    hit_tokens: int
    reach_tokens: int
    kinds: tuple[KindHit, ...]
    limited_by: str | None
    reason: Reason
    setting: str | None

    @property
    def lost_tokens(self) -> int:
        """Tokens that could be served and were not, for some kind of group could not."""
        return sum(kind.lost_tokens for kind in self.kinds)

    def __str__(self) -> str:
        """Say it in one sentence."""
        hit = "hit" if self.scheduled else "would hit"
        numbers = f"request {self.request_id} {hit} {self.hit_tokens} of {self.prompt_tokens}"
        again = " tokens after a preemption" if self.preempted else " prompt tokens"
        return f"{numbers}{again}: {self._why()}{self._advice()}"

    def _why(self) -> str:
        if self.reason in (Reason.TOO_SHORT, Reason.LAST_TOKEN):
            ends = f"hits end at multiples of {self.unit_tokens} tokens and before the last token"
            return f"{self.reason.value}, {ends}"
        if self.reason is Reason.LIMITED:
            alone = ", ".join(
                f"{kind.name} {kind.alone_tokens}"
                for kind in self.kinds
                if kind.alone_tokens is not None
            )
            lost = ", ".join(
                f"{kind.name} lost {kind.lost_tokens}" for kind in self.kinds if kind.lost_tokens
            )
            return f"alone could have served {alone}; {lost}"
        return self.reason.value

    def _advice(self) -> str:
        return f"; what may help: {self.setting}" if self.setting else ""


@dataclass(frozen=True)
class Found:
    """What a lookup found, and what was made of it.

    Attributes:
        limit: No hit is longer than this many tokens: all of the request's but the last.
        hit: Tokens taken from the cache.
        lost: By how many tokens each of the coordinator's `attention_groups` shortened the hit.
        alone: What each kind could have served, in tokens; None where nobody asked.
    """

    limit: int
    hit: int
    lost: tuple[int, ...]
    alone: tuple[int | None, ...]


@dataclass(frozen=True)
class Cache:
    """What explanations need to know of a coordinator.

    Attributes:
        kinds: Its kinds of groups.
        unit: Hits have a multiple of this many tokens.
        partial: Whether a hit may end inside a block.
        aligned_states: Whether it caches states, in a mode in which vLLM can do that.
        strategy: The setting `coordinator` that made it.
    """

    kinds: tuple[Kind, ...]
    unit: int
    partial: bool
    aligned_states: bool
    strategy: str

    def setting_for(self, kind: str | None) -> str | None:
        """Return what may lengthen hits.

        Args:
            kind: What limits them; None for the length of the unit.

        Returns:
            Settings and options; None where there are none.
        """
        settings = []
        if kind == MAMBA and self.strategy != "hybrid_aware" and self.aligned_states:
            settings.append("coordinator=hybrid_aware")
        if not self.partial and self.aligned_states:
            settings.append("prefix_match_unit=auto")
        if settings:
            return f"the hybrid_kv setting {' and '.join(settings)}"
        if kind is None or kind.endswith(DRAFT):
            return None if self.partial else "a smaller --block-size"
        return "more memory for the KV cache (--gpu-memory-utilization, --kv-cache-memory-bytes)"

    def reach(self, alone: tuple[int | None, ...]) -> int:
        """Return what full attention alone could serve, or else the most of what any kind could."""
        by_kind = list(zip(self.kinds, alone, strict=True))
        full = [tokens for kind, tokens in by_kind if kind.full_attention and tokens is not None]
        return max(full or [tokens for tokens in alone if tokens is not None], default=0)

    def lost_by_kind(self, found: Found) -> list[int]:
        """Return by how many tokens the groups of each kind shortened a hit."""
        return [sum([found.lost[group] for group in kind.groups]) for kind in self.kinds]

    def explain(
        self,
        found: Found | None,
        request_id: str,
        num_tokens: int,
        scheduled: bool,
        preempted: bool,
    ) -> Explanation:
        """Say why a request hit what it hit.

        Args:
            found: What was found; None where the request does not read the cache.
            request_id: The request's.
            num_tokens: Its tokens that were looked up, the last one included.
            scheduled: Whether it was found when the request was scheduled.
            preempted: Whether it had been preempted before.
        """
        if found is None:
            groups = sum(len(kind.groups) for kind in self.kinds)
            found = Found(num_tokens - 1, 0, (0,) * groups, (None,) * len(self.kinds))
            reason = Reason.NOT_READ
        else:
            reason = self._reason(found)
        kinds = self._kind_hits(found)
        limited_by = setting = None
        if reason is Reason.LIMITED:
            limited_by = max(kinds, key=lambda kind: kind.lost_tokens).name
            setting = self.setting_for(limited_by)
        elif reason is Reason.TOO_SHORT:
            setting = self.setting_for(None)
        return Explanation(
            request_id,
            scheduled,
            preempted,
            num_tokens,
            self.unit,
            found.hit,
            max(self.reach(found.alone), found.hit),
            kinds,
            limited_by,
            reason,
            setting,
        )

    def _kind_hits(self, found: Found) -> tuple[KindHit, ...]:
        return tuple(
            KindHit(kind.name, kind.draft, alone, lost)
            for kind, alone, lost in zip(
                self.kinds, found.alone, self.lost_by_kind(found), strict=True
            )
        )

    def _reason(self, found: Found) -> Reason:
        if found.limit < self.unit:
            return Reason.TOO_SHORT
        if any(found.lost):
            return Reason.LIMITED
        if found.hit + self.unit > found.limit:
            return Reason.LAST_TOKEN
        return Reason.NOT_CACHED


def kinds_of(groups: list[SpecGroup]) -> tuple[Kind, ...]:
    """Return the kinds of a coordinator's `attention_groups`, in their order."""
    places: dict[str, list[int]] = {}
    full: dict[str, bool] = {}
    for place, group in enumerate(groups):
        name = get_kv_cache_spec_kind(group.spec).value
        # States have no draft layers, but vLLM marks all groups where the model marks none.
        if group.use_eagle and name != MAMBA:
            name += DRAFT
        places.setdefault(name, []).append(place)
        full[name] = issubclass(group.manager_cls, FullAttentionManager)
    return tuple(Kind(name, tuple(groups), full[name]) for name, groups in places.items())
