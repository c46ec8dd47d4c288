# SPDX-License-Identifier: Apache-2.0
"""What pages a layer can have, by the kind of its spec. `docs/planning.md` says why it is so.

All functions of page sizes take and return arrays, int64, so that a search can ask for many at
once.
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

_BOUNDS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class LayerKind(ABC):
    """Layers of one spec.

    A plan gives a layer `k` of its present blocks to a page: a block of `k * block_size` tokens.

    Attributes:
        spec: The spec as it is before planning.
        unit: Bytes that the tokens of one present block take, or a state, without padding.
        cap: Present blocks that hold the longest sequence there is. What a page has beyond them
            is never written.
    """

    spec: KVCacheSpec
    unit: int
    cap: int

    @property
    def elastic(self) -> bool:
        """Whether the layer can have every page from `least_page` up."""
        return True

    @property
    def least_page(self) -> int:
        """The smallest page there is, in bytes: the present one without padding."""
        return self.unit

    @property
    def longest_page(self) -> int:
        """The page that holds the longest sequence there is, in bytes."""
        return self.cap * self.least_page

    @abstractmethod
    def blocks(self, pages: Bytes) -> Bytes:
        """Return the present blocks that pages of these sizes take, 0 where there is no way."""

    @abstractmethod
    def steps(self, low: int, high: int) -> Bytes:
        """Return the pages from `low` to `high` at which more tokens fit, or, of kinds that are
        not elastic, all that the layer can have."""

    def held(self, request: Fraction) -> Fraction:
        """Return how many tokens of a request the layer holds: all, or its window or chunk."""
        bounds = (getattr(self.spec, name, None) for name in _BOUNDS)
        return min([request, *(Fraction(bound) for bound in bounds if bound)])

    def within(self, match_unit: int) -> LayerKind:
        """Return what is left of the choice if every block has to divide a match unit.

        Args:
            match_unit: Tokens, a multiple of the present block.
        """
        return self

    def with_page(self, page: int) -> KVCacheSpec:
        """Return the spec with a page that `blocks` has a way for: scaled, and the rest padded."""
        blocks = int(self.blocks(np.array([page]))[0])
        return _scaled(self.spec, blocks, page, padded=blocks * self.unit != page)

    def used(self, pages: Bytes) -> Bytes:
        """Return the bytes of pages of these sizes that can hold tokens or a state."""
        return np.minimum(self.blocks(pages), self.cap) * self.unit

    def used_in(self, planned: KVCacheSpec) -> int:
        """Return the bytes of a page that can hold tokens or a state, whoever planned it."""
        return min(planned.block_size // self.spec.block_size, self.cap) * self.unit


class OneBlock(LayerKind):
    """Layers of which a request holds one block, however long it is."""

    def held(self, request: Fraction) -> Fraction:
        """Return the tokens of one block."""
        return Fraction(self.spec.block_size)


class State(OneBlock):
    """One state per block, or one ring per request: a page only pads."""

    def blocks(self, pages: Bytes) -> Bytes:
        """One, wherever the state fits."""
        return (pages >= self.unit).astype(np.int64)

    def steps(self, low: int, high: int) -> Bytes:
        """No page holds more of a state."""
        return np.empty(0, np.int64)

    def with_page(self, page: int) -> KVCacheSpec:
        """Pad."""
        if self.spec.page_size_bytes == page:
            return self.spec
        return replace(self.spec, page_size_padded=page)


class Attention(LayerKind):
    """Attention whose kernels take blocks of any multiple: scales, and pads what remains."""

    def blocks(self, pages: Bytes) -> Bytes:
        """As many as fit, or as many as are ever needed."""
        return np.minimum(pages // self.unit, self.cap)

    def steps(self, low: int, high: int) -> Bytes:
        """Return the multiples of a block's bytes."""
        return _multiples(self.unit, low, min(high, self.cap * self.unit))

    def within(self, match_unit: int) -> LayerKind:
        """Leave the blocks that divide the unit."""
        counts = _divisors(match_unit // self.spec.block_size)
        return DividingAttention(self.spec, self.unit, self.cap, _up_to(self.cap, counts))


@dataclass(frozen=True)
class DividingAttention(Attention):
    """Attention whose block has to divide a number of tokens.

    vLLM cuts a chunk of chunked local attention into whole blocks.

    Attributes:
        counts: Present blocks that a block can have, ascending.
    """

    counts: tuple[int, ...]

    @property
    def longest_page(self) -> int:
        """The page whose block holds the longest sequence, or a whole chunk, in bytes."""
        return self.counts[-1] * self.least_page

    def blocks(self, pages: Bytes) -> Bytes:
        """Return the longest block of a chunk that fits."""
        fitting = np.searchsorted(self.counts, pages // self.unit, side="right")
        return np.array([0, *self.counts], np.int64)[fitting]

    def steps(self, low: int, high: int) -> Bytes:
        """Return the bytes of each block that divides a chunk."""
        pages = np.array(self.counts, np.int64) * self.unit
        return pages[(pages >= low) & (pages <= high)]

    def within(self, match_unit: int) -> LayerKind:
        """Leave the blocks that divide the unit as well."""
        allowed = set(_divisors(match_unit // self.spec.block_size))
        return replace(self, counts=tuple(count for count in self.counts if count in allowed))


@dataclass(frozen=True)
class SplitAttention(LayerKind):
    """Attention whose kernels take blocks of a few sizes only, into which longer blocks are split.

    Only a page without padding can be split, so that a page either scales exactly, or is padded
    with the block as it is, if that is short enough for a kernel.
    """

    pads: bool

    @property
    def elastic(self) -> bool:
        """Only with a block that a kernel takes whole."""
        return self.pads

    def blocks(self, pages: Bytes) -> Bytes:
        """All of a page, or one and padding, or there is no way."""
        alone = np.full(len(pages), int(self.pads), np.int64)
        if self.pads and self.cap == 1:
            return alone
        return np.where(pages % self.unit == 0, pages // self.unit, alone)

    def steps(self, low: int, high: int) -> Bytes:
        """Return the multiples of a block's bytes."""
        return _multiples(self.unit, low, high)

    def within(self, match_unit: int) -> LayerKind:
        """Leave the blocks that divide the unit, the present one padded among them."""
        counts = _divisors(match_unit // self.spec.block_size)
        pages = tuple(count * self.unit for count in counts)
        return Listed(self.spec, self.unit, self.cap, pages, counts, int(self.pads))


@dataclass(frozen=True)
class RowAligned(LayerKind):
    """MLA, and whatever else only scales: read in whole rows, padded by its own alignment at most.

    Attributes:
        alignment: Bytes that a page is a multiple of, or None.
    """

    alignment: int | None

    @property
    def elastic(self) -> bool:
        """Never."""
        return False

    @property
    def least_page(self) -> int:
        """The present one, whose padding is part of its rows' alignment."""
        return self.spec.page_size_bytes

    def blocks(self, pages: Bytes) -> Bytes:
        """As the spec rounds up a scaled block's bytes, or as multiples of the present page."""
        present = self.spec.page_size_bytes
        whole = pages // present
        if self.alignment is None:
            return np.where(pages % present == 0, whole, 0)
        fit = pages // self.unit
        rounded = (pages % self.alignment == 0) & (pages - fit * self.unit < self.alignment)
        # Where a scaled block needs no rounding, the spec keeps a padding that it is given.
        kept = (pages % present == 0) & (whole * self.unit % self.alignment == 0)
        return np.where(rounded, fit, np.where(kept, whole, 0))

    def steps(self, low: int, high: int) -> Bytes:
        """Return every page that `blocks` has a way for."""
        present = self.spec.page_size_bytes
        if self.alignment is None:
            return _multiples(present, low, high)
        first = max(1, (low - self.alignment) // self.unit)
        blocks = np.arange(first, high // self.unit + 1, dtype=np.int64)
        rounded = -(-blocks * self.unit // self.alignment) * self.alignment
        pages = np.union1d(rounded, _multiples(present, low, high))
        pages = pages[(pages >= low) & (pages <= high)]
        return pages[self.blocks(pages) > 0]

    def within(self, match_unit: int) -> LayerKind:
        """Leave the blocks that divide the unit."""
        present = self.spec.page_size_bytes
        counts: dict[int, int] = {}
        # Of blocks that have one page, the longest.
        for count in _divisors(match_unit // self.spec.block_size):
            whole = count * present
            if self.alignment is None:
                counts[whole] = count
                continue
            counts[-(-count * self.unit // self.alignment) * self.alignment] = count
            if count * self.unit % self.alignment == 0:
                counts.setdefault(whole, count)
        pages, blocks = zip(*sorted(counts.items()), strict=True)
        return Listed(self.spec, self.unit, self.cap, pages, blocks, otherwise=0)


@dataclass(frozen=True)
class Listed(LayerKind):
    """Layers with a list of pages that they can have.

    Attributes:
        pages: Bytes, ascending.
        counts: Present blocks of each page.
        otherwise: Present blocks of every other page.
    """

    pages: tuple[int, ...]
    counts: tuple[int, ...]
    otherwise: int

    @property
    def elastic(self) -> bool:
        """Only if every other page can be padded."""
        return self.otherwise > 0

    @property
    def least_page(self) -> int:
        """The first of the list, in bytes."""
        return self.pages[0]

    @property
    def longest_page(self) -> int:
        """The last of the list, in bytes."""
        return self.pages[-1]

    def blocks(self, pages: Bytes) -> Bytes:
        """Look the pages up."""
        index = np.searchsorted(self.pages, pages).clip(max=len(self.pages) - 1)
        found = np.asarray(self.pages)[index] == pages
        return np.where(found, np.asarray(self.counts)[index], self.otherwise)

    def steps(self, low: int, high: int) -> Bytes:
        """Return the listed pages from `low` to `high`."""
        pages = np.array(self.pages, np.int64)
        return pages[(pages >= low) & (pages <= high)]


@dataclass(frozen=True)
class Fixed(OneBlock):
    """A layer whose bytes do not grow in step with its block: has the page that it has."""

    @property
    def elastic(self) -> bool:
        """Never."""
        return False

    @property
    def least_page(self) -> int:
        """It has one page."""
        return self.spec.page_size_bytes

    def blocks(self, pages: Bytes) -> Bytes:
        """One, at the present page."""
        return (pages == self.spec.page_size_bytes).astype(np.int64)

    def steps(self, low: int, high: int) -> Bytes:
        """Return the present page."""
        return _multiples(self.spec.page_size_bytes, low, min(high, self.spec.page_size_bytes))

    def with_page(self, page: int) -> KVCacheSpec:
        """Leave it."""
        return self.spec


def layer_kind(spec: KVCacheSpec, longest: int) -> LayerKind:
    """Return what a layer can do.

    Args:
        spec: The layer's.
        longest: Tokens of the longest sequence there is.
    """
    if isinstance(spec, (MambaSpec, CircularBufferSpec)):
        return State(spec, spec.real_page_size_bytes, 1)
    cap = max(1, -(-longest // spec.block_size))
    unit = spec.unpadded_page_size_bytes if isinstance(spec, AttentionSpec) else None
    if not _scales(spec, unit):
        pads = isinstance(spec, AttentionSpec) and not _is_mla(spec)
        return State(spec, unit or 0, 1) if pads else Fixed(spec, unit or spec.page_size_bytes, 1)
    if unit is None:
        return RowAligned(spec, spec.page_size_bytes, cap, None)
    if _is_mla(spec):
        return RowAligned(spec, unit, cap, getattr(spec, "alignment", None))
    kernel_blocks = spec.block_stride_alignment
    if isinstance(kernel_blocks, MultipleOf):
        return SplitAttention(spec, unit, cap, pads=spec.block_size <= kernel_blocks.base)
    in_a_chunk, rest = divmod(getattr(spec, "attention_chunk_size", None) or 0, spec.block_size)
    if in_a_chunk and not rest:
        return DividingAttention(spec, unit, cap, _up_to(cap, _divisors(in_a_chunk)))
    return Attention(spec, unit, cap)


def page_granularity(kinds: Iterable[LayerKind]) -> int:
    """Return what a common page must be a multiple of for the worker's views, in bytes.

    The worker views pages as tensors of the layers' dtypes.
    """
    sizes = {1}
    for kind in kinds:
        dtypes = getattr(kind.spec, "dtypes", None) or [getattr(kind.spec, "dtype", None)]
        sizes |= {get_dtype_size(dtype) for dtype in dtypes if dtype is not None}
    return math.lcm(*sizes)


def _is_mla(spec: AttentionSpec) -> bool:
    # A sliding-window MLA layer with an alignment has its page rounded up by its spec too.
    return isinstance(spec, MLAAttentionSpec) or getattr(spec, "alignment", None) is not None


def _scales(spec: KVCacheSpec, unit: int | None) -> bool:
    """Whether twice the block takes twice the bytes. Compressed layers round tokens to states."""
    twice = spec.copy_with_new_block_size(2 * spec.block_size)
    if unit is None:
        return bool(twice.page_size_bytes == 2 * spec.page_size_bytes)
    return unit > 0 and bool(twice.unpadded_page_size_bytes == 2 * unit)


def _scaled(spec: KVCacheSpec, blocks: int, page: int, padded: bool) -> KVCacheSpec:
    if blocks == 1 and spec.page_size_bytes == page:
        return spec
    changed: dict[str, Any] = {"block_size": blocks * spec.block_size}
    if isinstance(spec, AttentionSpec):
        changed["page_size_padded"] = page if padded else None
    return replace(spec, **changed)


@cache
def _divisors(number: int) -> tuple[int, ...]:
    low = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    return tuple(sorted({*low, *(number // k for k in low)}))


def _up_to(cap: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Return the counts below a cap and the first that reaches it."""
    return counts[: bisect_left(counts, cap) + 1]


def _multiples(unit: int, low: int, high: int) -> Bytes:
    return np.arange(-(-low // unit), high // unit + 1, dtype=np.int64) * unit
