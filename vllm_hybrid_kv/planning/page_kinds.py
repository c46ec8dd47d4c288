# SPDX-License-Identifier: Apache-2.0
"""The page sizes that a layer can have, by kind of spec. `docs/planning.md` gives the reasons.

Page sizes are int64 arrays of bytes, so that a search evaluates many at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
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

Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LayerKind(ABC):
    """Layers with one spec, and the pages that they can have.

    A planned page holds `k` present blocks, so the planned block has `k * block_size` tokens.

    Attributes:
        spec: The spec before planning.
        unit: Bytes of the tokens of a present block, or of a state, without padding.
        cap: Present blocks that hold the longest sequence. Page space beyond them is never written.
    """

    spec: KVCacheSpec
    unit: int
    cap: int

    @property
    def elastic(self) -> bool:
        """Whether every page from `least_page` up is possible."""
        return True

    @property
    def least_page(self) -> int:
        """The smallest possible page in bytes: the present one without padding."""
        return self.unit

    @property
    def longest_page(self) -> int:
        """The page that holds the longest sequence, in bytes."""
        return self.cap * self.least_page

    @abstractmethod
    def blocks(self, pages: Bytes) -> Bytes:
        """Return how many present blocks each page holds; 0 if a page is not possible."""

    @abstractmethod
    def steps(self, low: int, high: int) -> Bytes:
        """Return the pages from `low` to `high` at which the number of blocks grows.

        For kinds that are not elastic: all possible pages in that range.
        """

    def held(self, request: Fraction) -> Fraction:
        """Return how many tokens of a request the layer holds: all, or its window or chunk."""
        bounds = (
            getattr(self.spec, name, None) for name in ("sliding_window", "attention_chunk_size")
        )
        return min([request, *(Fraction(bound) for bound in bounds if bound)])

    def within(self, match_unit: int) -> LayerKind:
        """Return this kind restricted to blocks that divide a match unit of so many tokens.

        The match unit is a multiple of the present block.
        """
        return self

    def with_page(self, page: int) -> KVCacheSpec:
        """Return the spec with a possible page: scaled, and the rest of the page padded."""
        blocks = int(self.blocks(np.array([page]))[0])
        if blocks == 1 and self.spec.page_size_bytes == page:
            return self.spec
        changed: dict[str, Any] = {"block_size": blocks * self.spec.block_size}
        if isinstance(self.spec, AttentionSpec):
            changed["page_size_padded"] = page if blocks * self.unit != page else None
        return replace(self.spec, **changed)

    def used(self, pages: Bytes) -> Bytes:
        """Return the bytes of each page that can hold tokens or a state."""
        return np.minimum(self.blocks(pages), self.cap) * self.unit

    def used_in(self, planned: KVCacheSpec) -> int:
        """Return the bytes that can hold tokens or a state in a page of any strategy's plan."""
        return min(planned.block_size // self.spec.block_size, self.cap) * self.unit


class OneBlock(LayerKind):
    """Layers of which a request holds one block, whatever its length."""

    def held(self, request: Fraction) -> Fraction:
        return Fraction(self.spec.block_size)


class State(OneBlock):
    """One state per block, or one ring per request: pages are only padded."""

    def blocks(self, pages: Bytes) -> Bytes:
        return (pages >= self.unit).astype(np.int64)

    def steps(self, low: int, high: int) -> Bytes:
        return np.empty(0, np.int64)

    def with_page(self, page: int) -> KVCacheSpec:
        if self.spec.page_size_bytes == page:
            return self.spec
        return replace(self.spec, page_size_padded=page)


class Attention(LayerKind):
    """Attention whose kernels take blocks of any multiple: scaled, then padded."""

    def blocks(self, pages: Bytes) -> Bytes:
        return np.minimum(pages // self.unit, self.cap)

    def steps(self, low: int, high: int) -> Bytes:
        return _multiples(self.unit, low, min(high, self.cap * self.unit))

    def within(self, match_unit: int) -> LayerKind:
        counts = _divisors(match_unit // self.spec.block_size)
        return DividingAttention(self.spec, self.unit, self.cap, _up_to(self.cap, counts))


@dataclass(frozen=True)
class DividingAttention(Attention):
    """Attention whose block must divide a number of tokens.

    vLLM splits a chunk of chunked local attention into whole blocks.

    Attributes:
        counts: Present blocks that a block can have, ascending.
    """

    counts: tuple[int, ...]

    @property
    def longest_page(self) -> int:
        return self.counts[-1] * self.least_page

    def blocks(self, pages: Bytes) -> Bytes:
        fitting = np.searchsorted(self.counts, pages // self.unit, side="right")
        return np.array([0, *self.counts], np.int64)[fitting]

    def steps(self, low: int, high: int) -> Bytes:
        return _in_range(np.array(self.counts, np.int64) * self.unit, low, high)

    def within(self, match_unit: int) -> LayerKind:
        allowed = set(_divisors(match_unit // self.spec.block_size))
        return replace(self, counts=tuple(count for count in self.counts if count in allowed))


@dataclass(frozen=True)
class WholeBlocks(LayerKind):
    """Layers whose pages are multiples of one size, such as MLA, which is read in whole rows.

    If kernels take a few block sizes and longer blocks are split into those, only a page without
    padding can be split. Such a page can also be padded if a kernel takes the present block whole.

    Attributes:
        step: Bytes of the page of a present block.
        pads: Whether every other page can hold the present block and padding.
    """

    step: int
    pads: bool = False

    @property
    def elastic(self) -> bool:
        return self.pads

    @property
    def least_page(self) -> int:
        return self.step

    def blocks(self, pages: Bytes) -> Bytes:
        alone = np.full(len(pages), int(self.pads), np.int64)
        if self.pads and self.cap == 1:
            return alone
        return np.where(pages % self.step == 0, pages // self.step, alone)

    def steps(self, low: int, high: int) -> Bytes:
        return _multiples(self.step, low, high)

    def within(self, match_unit: int) -> LayerKind:
        counts = _divisors(match_unit // self.spec.block_size)
        pages = tuple(count * self.step for count in counts)
        return Listed(self.spec, self.unit, self.cap, pages, counts, int(self.pads))


@dataclass(frozen=True)
class RowAligned(LayerKind):
    """MLA whose spec rounds every page up to an alignment in bytes."""

    alignment: int

    @property
    def elastic(self) -> bool:
        return False

    @property
    def least_page(self) -> int:
        return self.spec.page_size_bytes

    def blocks(self, pages: Bytes) -> Bytes:
        fit, whole = pages // self.unit, pages // self.least_page
        rounded = (pages % self.alignment == 0) & (pages - fit * self.unit < self.alignment)
        # If a scaled block needs no rounding, the spec keeps an explicit padding.
        kept = (pages % self.least_page == 0) & (whole * self.unit % self.alignment == 0)
        return np.where(rounded, fit, np.where(kept, whole, 0))

    def steps(self, low: int, high: int) -> Bytes:
        first = max(1, (low - self.alignment) // self.unit)
        blocks = np.arange(first, high // self.unit + 1, dtype=np.int64)
        pages = np.union1d(self._rounded(blocks), _multiples(self.least_page, low, high))
        pages = _in_range(pages, low, high)
        return pages[self.blocks(pages) > 0]

    def within(self, match_unit: int) -> LayerKind:
        counts: dict[int, int] = {}
        # Of several blocks with the same page, the longest wins.
        for count in _divisors(match_unit // self.spec.block_size):
            counts[self._rounded(count)] = count
            if count * self.unit % self.alignment == 0:
                counts.setdefault(count * self.least_page, count)
        pages, blocks = zip(*sorted(counts.items()), strict=True)
        return Listed(self.spec, self.unit, self.cap, pages, blocks, others=0)

    def _rounded(self, blocks: Any) -> Any:
        return -(-blocks * self.unit // self.alignment) * self.alignment


@dataclass(frozen=True)
class Listed(LayerKind):
    """Layers with a list of pages.

    Attributes:
        pages: Bytes, ascending.
        counts: Present blocks of each page.
        others: Present blocks of every page that is not listed.
    """

    pages: tuple[int, ...]
    counts: tuple[int, ...]
    others: int

    @property
    def elastic(self) -> bool:
        return self.others > 0

    @property
    def least_page(self) -> int:
        return self.pages[0]

    @property
    def longest_page(self) -> int:
        return self.pages[-1]

    def blocks(self, pages: Bytes) -> Bytes:
        index = np.searchsorted(self.pages, pages).clip(max=len(self.pages) - 1)
        listed = np.asarray(self.pages)[index] == pages
        return np.where(listed, np.asarray(self.counts)[index], self.others)

    def steps(self, low: int, high: int) -> Bytes:
        return _in_range(np.array(self.pages, np.int64), low, high)


class Fixed(OneBlock, Listed):
    """Layers whose bytes do not grow in step with their block: the present page only."""


def layer_kind(spec: KVCacheSpec, longest: int) -> LayerKind:
    """Return the kind of a layer. The longest sequence has `longest` tokens."""
    if isinstance(spec, (MambaSpec, CircularBufferSpec)):
        return State(spec, spec.real_page_size_bytes, 1)
    cap = max(1, -(-longest // spec.block_size))
    unit = spec.unpadded_page_size_bytes if isinstance(spec, AttentionSpec) else None
    if not _scales(spec, unit):
        page = spec.page_size_bytes
        pads = isinstance(spec, AttentionSpec) and not _is_mla(spec)
        return State(spec, unit or 0, 1) if pads else Fixed(spec, unit or page, 1, (page,), (1,), 0)
    if unit is None:
        return WholeBlocks(spec, spec.page_size_bytes, cap, spec.page_size_bytes)
    if _is_mla(spec):
        if (alignment := getattr(spec, "alignment", None)) is not None:
            return RowAligned(spec, unit, cap, alignment)
        return WholeBlocks(spec, unit, cap, spec.page_size_bytes)
    kernel_blocks = spec.block_stride_alignment
    if isinstance(kernel_blocks, MultipleOf):
        return WholeBlocks(spec, unit, cap, unit, pads=spec.block_size <= kernel_blocks.base)
    in_a_chunk, rest = divmod(getattr(spec, "attention_chunk_size", None) or 0, spec.block_size)
    if in_a_chunk and not rest:
        return DividingAttention(spec, unit, cap, _up_to(cap, _divisors(in_a_chunk)))
    return Attention(spec, unit, cap)


def page_granularity(kinds: Iterable[LayerKind]) -> int:
    """Return the bytes that a common page must be a multiple of.

    The worker views pages as tensors of the layers' dtypes.
    """
    sizes = {1}
    for kind in kinds:
        dtypes = getattr(kind.spec, "dtypes", None) or [getattr(kind.spec, "dtype", None)]
        sizes |= {get_dtype_size(dtype) for dtype in dtypes if dtype is not None}
    return math.lcm(*sizes)


def _is_mla(spec: AttentionSpec) -> bool:
    # The spec of a sliding-window MLA layer with an alignment rounds its page up, too.
    return isinstance(spec, MLAAttentionSpec) or getattr(spec, "alignment", None) is not None


def _scales(spec: KVCacheSpec, unit: int | None) -> bool:
    """Whether twice the block takes twice the bytes. Compressed layers round tokens to states."""
    twice = spec.copy_with_new_block_size(2 * spec.block_size)
    if unit is None:
        return bool(twice.page_size_bytes == 2 * spec.page_size_bytes)
    return unit > 0 and bool(twice.unpadded_page_size_bytes == 2 * unit)


@cache
def _divisors(number: int) -> tuple[int, ...]:
    low = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return tuple(sorted({*low, *(number // k for k in low)}))


def _up_to(cap: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Return the counts below a cap and the first that reaches it."""
    return counts[: bisect_left(counts, cap) + 1]


def _multiples(unit: int, low: int, high: int) -> Bytes:
    return np.arange(-(-low // unit), high // unit + 1, dtype=np.int64) * unit


def _in_range(pages: Bytes, low: int, high: int) -> Bytes:
    return pages[(pages >= low) & (pages <= high)]
