# SPDX-License-Identifier: Apache-2.0
"""Explains the length of a request's cache hit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpecKind, MambaSpec, get_kv_cache_spec_kind

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator

DRAFT = "_draft"
"""Suffix of the kind of KV groups that include draft layers (EAGLE, MTP)."""

MAMBA = KVCacheSpecKind.MAMBA.value


class Reason(Enum):
    """Why a hit was not longer."""

    NOT_READ = "the request does not read the prefix cache"
    TOO_SHORT = "the prompt is shorter than the match unit"
    LAST_TOKEN = "a longer hit is impossible"
    NOT_CACHED = "nothing longer was cached"
    LIMITED = "KV groups of one kind could not serve what others could"


@dataclass(frozen=True)
class GroupKind:
    """One kind of KV group of a coordinator.

    Attributes:
        name: vLLM's name, with the suffix `_draft` if its groups include draft layers.
        groups: Indices of its groups in the coordinator's `attention_groups`.
        full_attention: Whether every earlier token is attended to.
    """

    name: str
    groups: tuple[int, ...]
    full_attention: bool


@dataclass(frozen=True)
class KindHit:
    """How the groups of one kind affected a hit.

    Attributes:
        name: See `GroupKind`.
        draft: Whether its groups include draft layers.
        alone_tokens: The longest prefix that they could serve without the other groups. None if it
            was not looked up, because neither metrics nor DEBUG lines are on.
        lost_tokens: By how many tokens they shortened the hit.
    """

    name: str
    draft: bool
    alone_tokens: int | None
    lost_tokens: int


@dataclass(frozen=True)
class Explanation:
    """Why a request did not hit more. `str()` returns it as one sentence.

    Attributes:
        request_id: The request.
        scheduled: Whether this describes the lookup with which the request was scheduled.
            Otherwise it describes a lookup now.
        preempted: Whether the request was preempted before.
        prompt_tokens: Tokens that were looked up: the prompt and, after a preemption, the output
            up to then.
        unit_tokens: Hits are multiples of this many tokens.
        hit_tokens: Tokens read from the cache, without those that a KV connector loads.
        reach_tokens: What full attention alone could serve. If there is no full-attention group,
            the maximum over all kinds.
        kinds: The kinds of KV groups.
        limited_by: The kind that lost most tokens, if any lost some.
        reason: Why the hit was not longer.
        setting: A setting that may lengthen hits, if there is one.
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
        """Cached tokens that were not hit because some kind of group could not serve them."""
        return sum(kind.lost_tokens for kind in self.kinds)

    def __str__(self) -> str:
        verb = "hit" if self.scheduled else "would hit"
        tokens = "tokens after a preemption" if self.preempted else "prompt tokens"
        advice = f"; try {self.setting}" if self.setting else ""
        return (
            f"request {self.request_id} {verb} {self.hit_tokens} of {self.prompt_tokens} {tokens}: "
            f"{self._why()}{advice}"
        )

    def _why(self) -> str:
        if self.reason in (Reason.TOO_SHORT, Reason.LAST_TOKEN):
            return (
                f"{self.reason.value}, because hits end at multiples of {self.unit_tokens} tokens "
                "and before the last token"
            )
        if self.reason is Reason.LIMITED:
            alone = [(kind.name, kind.alone_tokens) for kind in self.kinds]
            prefixes = ", ".join(f"{name} {n}" for name, n in alone if n is not None)
            lost = [
                f"{kind.name} lost {kind.lost_tokens}" for kind in self.kinds if kind.lost_tokens
            ]
            return f"longest prefix of each kind alone: {prefixes}; {', '.join(lost)}"
        return self.reason.value


@dataclass(frozen=True)
class HitRecord:
    """The result of one lookup.

    Attributes:
        limit: The maximum hit in tokens: all tokens of the request but the last.
        hit: Tokens read from the cache.
        lost: By how many tokens each of the coordinator's `attention_groups` shortened the hit.
        alone: Tokens that each kind could serve alone, or None if not looked up.
    """

    limit: int
    hit: int
    lost: tuple[int, ...]
    alone: tuple[int | None, ...]


@dataclass(frozen=True)
class CacheDescription:
    """The properties of a coordinator that explanations depend on.

    Attributes:
        kinds: The kinds of its groups.
        unit: Hits are multiples of this many tokens.
        partial: Whether a hit may end inside a block.
        aligned_states: Whether all its states are cached in mode `align`.
        strategy: The value of the setting `coordinator`.
    """

    kinds: tuple[GroupKind, ...]
    unit: int
    partial: bool
    aligned_states: bool
    strategy: str

    @classmethod
    def of(cls, coordinator: HybridKVCacheCoordinator, strategy: str) -> CacheDescription:
        groups: dict[str, list[int]] = {}
        full: dict[str, bool] = {}
        modes = set()
        for index, group in enumerate(coordinator.attention_groups):
            name = get_kv_cache_spec_kind(group.spec).value
            # vLLM marks all groups if the model marks none, but states have no draft layers.
            if group.use_eagle and name != MAMBA:
                name += DRAFT
            groups.setdefault(name, []).append(index)
            full[name] = issubclass(group.manager_cls, FullAttentionManager)
            if isinstance(group.spec, MambaSpec):
                modes.add(group.spec.mamba_cache_mode)
        return cls(
            tuple(GroupKind(name, tuple(of_kind), full[name]) for name, of_kind in groups.items()),
            coordinator._cache_hit_alignment_tokens,
            coordinator.enable_partial_hash_hits,
            modes == {"align"},
            strategy,
        )

    def setting_for(self, kind: str | None) -> str | None:
        """Return settings or options that may lengthen hits, or None.

        Args:
            kind: The kind that limits hits, or None if the match unit does.
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
        """Return what full attention alone could serve, or the maximum over all kinds without it.

        Args:
            alone: Tokens that each kind could serve alone, or None if not looked up.
        """
        full = [n for kind, n in zip(self.kinds, alone, strict=True) if kind.full_attention]
        return max((n for n in full or alone if n is not None), default=0)

    def lost_by_kind(self, record: HitRecord) -> list[int]:
        return [sum([record.lost[group] for group in kind.groups]) for kind in self.kinds]

    def explain(
        self,
        record: HitRecord | None,
        request_id: str,
        num_tokens: int,
        scheduled: bool,
        preempted: bool,
    ) -> Explanation:
        """Explain a request's hit.

        Args:
            record: Its lookup, or None if the request does not read the cache.
            request_id: The request.
            num_tokens: Tokens that were looked up, including the last one.
            scheduled: Whether the request was scheduled with this lookup.
            preempted: Whether it was preempted before.
        """
        reason = Reason.NOT_READ if record is None else self._reason(record)
        if record is None:
            groups = sum(len(kind.groups) for kind in self.kinds)
            record = HitRecord(num_tokens - 1, 0, (0,) * groups, (None,) * len(self.kinds))
        kinds = tuple(
            KindHit(kind.name, kind.name.endswith(DRAFT), alone, lost)
            for kind, alone, lost in zip(
                self.kinds, record.alone, self.lost_by_kind(record), strict=True
            )
        )
        limited_by = setting = None
        if reason is Reason.LIMITED:
            limited_by = max(kinds, key=lambda kind: kind.lost_tokens).name
        if reason in (Reason.LIMITED, Reason.TOO_SHORT):
            setting = self.setting_for(limited_by)
        return Explanation(
            request_id,
            scheduled,
            preempted,
            num_tokens,
            self.unit,
            record.hit,
            max(self.reach(record.alone), record.hit),
            kinds,
            limited_by,
            reason,
            setting,
        )

    def _reason(self, record: HitRecord) -> Reason:
        if record.limit < self.unit:
            return Reason.TOO_SHORT
        if any(record.lost):
            return Reason.LIMITED
        if record.hit + self.unit > record.limit:
            return Reason.LAST_TOKEN
        return Reason.NOT_CACHED
