# SPDX-License-Identifier: Apache-2.0
"""The page sizes that a layer can have, by kind of spec. `docs/planning.md` gives the reasons.

Page sizes are int64 arrays of bytes, so that a search evaluates many at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    CircularBufferSpec,
    KVCacheSpec,
    MambaSpec,
    MLAAttentionSpec,
)

from vllm_hybrid_kv.planning.page_sizes import content_bytes

Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LayerKind(ABC):
    """Layers with one spec, and the pages that they can have.

    An old block is a block before planning. If a planned page holds `k` old blocks, the planned
    block has `k * block_size` tokens.

    Attributes:
        spec: The spec before planning.
        unit: Bytes that an old block's tokens, or a state, need without padding.
        cap: Old blocks that hold the longest sequence. Page space beyond them is never written.
        least_page: The smallest possible page in bytes: the page before planning, without padding.
        elastic: Whether every page from `least_page` up is possible.
    """

    spec: KVCacheSpec
    unit: int
    cap: int
    least_page: int
    elastic: bool

    @property
    def longest_page(self) -> int:
        """Bytes of the page whose block holds the longest sequence."""
        return self.cap * self.least_page

    @abstractmethod
    def blocks(self, pages: Bytes) -> Bytes:
        """Return how many old blocks each page holds, or 0 for an impossible page."""

    @abstractmethod
    def steps(self, low: int, high: int) -> Bytes:
        """Return the pages from `low` to `high` that are worth trying.

        Elastic kinds return the sizes at which more old blocks fit. Others return all sizes.
        """

    def within(self, match_unit: int) -> LayerKind:
        """Return a kind that has only the block sizes which divide the match unit."""
        return self

    def held(self, request: float) -> float:
        """Return how many tokens of a request a layer keeps: all, or one window, chunk or block."""
        if self.cap == 1:
            return self.spec.block_size
        window = getattr(self.spec, "sliding_window", None)
        chunk = getattr(self.spec, "attention_chunk_size", None)
        return float(min(request, window or request, chunk or request))

    def with_page(self, page: int) -> KVCacheSpec:
        """Return the spec for a possible page: its block is scaled, and the rest is padding."""
        blocks = int(self.blocks(np.array([page]))[0])
        if blocks == 1 and self.spec.page_size_bytes == page:
            return self.spec
        changed: dict[str, Any] = {"block_size": blocks * self.spec.block_size}
        if isinstance(self.spec, (AttentionSpec, MambaSpec)):
            changed["page_size_padded"] = page if blocks * self.unit != page else None
        return replace(self.spec, **changed)

    def listed(self, counts: dict[int, int]) -> LayerKind:
        """Return a kind with only these pages: `counts` maps a page's bytes to its old blocks."""
        pages, blocks = zip(*sorted(counts.items()), strict=True)
        return Listed(self.spec, self.unit, self.cap, pages[0], self.elastic, pages, blocks)

    def used(self, pages: Bytes) -> Bytes:
        """Return how many bytes of each page can hold tokens or a state."""
        return np.minimum(self.blocks(pages), self.cap) * self.unit

    def used_in(self, planned: KVCacheSpec) -> int:
        """Return how many bytes of a planned spec's page can hold tokens or a state."""
        return min(planned.block_size // self.spec.block_size, self.cap) * self.unit


@dataclass(frozen=True)
class Padded(LayerKind):
    """Layers that can be padded: states, and attention whose kernels take any multiple of a block.

    A planned block's number of old blocks must divide `whole`, unless `whole` is 0. Chunked local
    attention sets `whole`, because vLLM splits a chunk into whole blocks.
    """

    whole: int = 0

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The possible numbers of old blocks: the divisors of `whole`, until one reaches `cap`."""
        divisors = _divisors(self.whole)
        return divisors[: bisect_left(divisors, self.cap) + 1]

    @property
    def longest_page(self) -> int:
        return self.unit * (self.counts[-1] if self.whole else self.cap)

    def blocks(self, pages: Bytes) -> Bytes:
        fitting = pages // self.unit
        if not self.whole:
            return np.minimum(fitting, self.cap)
        return np.array([0, *self.counts])[np.searchsorted(self.counts, fitting, side="right")]

    def steps(self, low: int, high: int) -> Bytes:
        if not self.whole:
            return multiples(self.unit, low, min(high, self.longest_page))
        return np.array(self.counts) * self.unit

    def within(self, match_unit: int) -> LayerKind:
        return replace(self, whole=math.gcd(self.whole, match_unit // self.spec.block_size))


@dataclass(frozen=True)
class WholeBlocks(LayerKind):
    """Layers whose pages are multiples of one size, such as MLA.

    If kernels take only some block sizes, vLLM splits longer blocks into these sizes. Pages that it
    splits cannot have padding. A page of one old block can be padded if a kernel takes this block
    whole.
    """

    def blocks(self, pages: Bytes) -> Bytes:
        whole = (pages % self.least_page == 0) & (not self.elastic or self.cap > 1)
        return np.where(whole, pages // self.least_page, int(self.elastic))

    def steps(self, low: int, high: int) -> Bytes:
        return multiples(self.least_page, low, high)

    def within(self, match_unit: int) -> LayerKind:
        counts = _divisors(match_unit // self.spec.block_size)
        return self.listed({count * self.least_page: count for count in counts})


@dataclass(frozen=True)
class RowAligned(LayerKind):
    """MLA layers whose spec rounds every page up to a multiple of `alignment` bytes."""

    alignment: int

    def blocks(self, pages: Bytes) -> Bytes:
        fit, whole = pages // self.unit, pages // self.least_page
        rounded = (pages % self.alignment == 0) & (pages - fit * self.unit < self.alignment)
        # A page can also be several old pages with their padding, if its tokens need no rounding.
        kept = (pages % self.least_page == 0) & (whole * self.unit % self.alignment == 0)
        return np.where(rounded, fit, np.where(kept, whole, 0))

    def steps(self, low: int, high: int) -> Bytes:
        rounded = self._rounded(multiples(self.unit, max(1, low - self.alignment), high))
        return np.union1d(rounded, multiples(self.least_page, low, high))

    def within(self, match_unit: int) -> LayerKind:
        counts: dict[int, int] = {}
        # If blocks of several lengths have equal pages, the longest of these blocks wins.
        for count in _divisors(match_unit // self.spec.block_size):
            counts[self._rounded(count * self.unit)] = count
            if count * self.unit % self.alignment == 0:
                counts.setdefault(count * self.least_page, count)
        return self.listed(counts)

    def _rounded(self, content: Any) -> Any:
        return -(-content // self.alignment) * self.alignment


@dataclass(frozen=True)
class Listed(LayerKind):
    """Layers that can have only listed pages. Some can have only the page before planning.

    Attributes:
        pages: Bytes of the pages, ascending.
        counts: Old blocks in each page. If elastic, every other page has one old block.
    """

    pages: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def longest_page(self) -> int:
        return self.pages[-1]

    def blocks(self, pages: Bytes) -> Bytes:
        index = np.searchsorted(self.pages, pages).clip(max=len(self.pages) - 1)
        listed = np.asarray(self.pages)[index] == pages
        return np.where(listed, np.asarray(self.counts)[index], int(self.elastic))

    def steps(self, low: int, high: int) -> Bytes:
        return np.array(self.pages)


def layer_kind(spec: KVCacheSpec, longest: int) -> LayerKind:
    """Return the kind of a layer. The longest sequence has `longest` tokens."""
    unit = content_bytes(spec)
    if isinstance(spec, (MambaSpec, CircularBufferSpec)):
        return Padded(spec, unit, 1, unit, True)
    # Treat spec classes of other packages like MLA, because they may not support padding.
    in_rows = not isinstance(spec, AttentionSpec) or _is_mla(spec)
    twice = spec.copy_with_new_block_size(2 * spec.block_size)
    if unit == 0 or content_bytes(twice) != 2 * unit:
        # A compressed layer rounds its number of states up, so pages do not scale with the block.
        if in_rows:
            page = spec.page_size_bytes
            return Listed(spec, unit, 1, page, False, (page,), (1,))
        return Padded(spec, unit or 1, 1, unit or 1, True)
    cap = max(1, -(-longest // spec.block_size))
    if in_rows:
        if (alignment := getattr(spec, "alignment", None)) is not None:
            return RowAligned(spec, unit, cap, spec.page_size_bytes, False, alignment)
        return WholeBlocks(spec, unit, cap, spec.page_size_bytes, False)
    kernel_blocks = getattr(spec, "block_stride_alignment", None)
    if isinstance(kernel_blocks, MultipleOf):
        return WholeBlocks(spec, unit, cap, unit, spec.block_size <= kernel_blocks.base)
    chunk = getattr(spec, "attention_chunk_size", None) or 0
    whole = 0 if chunk % spec.block_size else chunk // spec.block_size
    return Padded(spec, unit, cap, unit, True, whole)


def page_granularity(specs: Sequence[KVCacheSpec]) -> int:
    """Return the number of bytes of which every common page must be a multiple.

    The worker views pages as tensors, so a page must have whole elements of all layers' dtypes.
    """
    dtypes = {dtype for spec in specs for dtype in getattr(spec, "dtypes", ())}
    dtypes |= {spec.dtype for spec in specs if isinstance(spec, AttentionSpec)}
    return math.lcm(*map(get_dtype_size, dtypes))


def _is_mla(spec: AttentionSpec) -> bool:
    # The spec of a sliding-window MLA layer with an alignment rounds its page up, too.
    return isinstance(spec, MLAAttentionSpec) or getattr(spec, "alignment", None) is not None


@cache
def _divisors(number: int) -> tuple[int, ...]:
    low = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return tuple(sorted({*low, *(number // k for k in low)}))


def multiples(unit: int, low: int, high: int) -> Bytes:
    """Return the multiples of a unit from `low` to `high`."""
    return np.arange(-(-low // unit), high // unit + 1, dtype=np.int64) * unit
