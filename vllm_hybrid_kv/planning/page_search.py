# SPDX-License-Identifier: Apache-2.0
"""The search for a common page. `docs/planning.md` proves that it overlooks none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_hybrid_kv.planning.page_kinds import Bytes, LayerKind, WholeBlocks, page_granularity

CLOSE = 1e-12
"""Floats that differ by less are compared again as fractions."""


@dataclass(frozen=True)
class CommonPage:
    """A page that suits all layers.

    Attributes:
        size: Its bytes.
        used: Bytes that can hold tokens or a state, summed over one page of every layer.
        waste: The share of the pool, or of a request's pages, that is padding.
    """

    size: int
    used: int
    waste: Fraction


def cheapest_page(
    kinds: Sequence[tuple[LayerKind, int]], reference: Fraction
) -> tuple[CommonPage, int] | None:
    """Return the page with the lowest cost, and the match unit that its blocks divide.

    The cost is the share of a reference request's pages that is padding, plus
    `match_unit / (2 * reference)`: the share of the request that a cache hit misses on average,
    because hits end at multiples of the match unit.

    Args:
        kinds: Each kind of layer and its number of layers.
        reference: Tokens of the request.

    Returns:
        The page, whose waste is that of the request, and the match unit in tokens. Of equal costs
        the smallest match unit wins. None if no plan costs less than 1.
    """
    present = math.lcm(*(kind.spec.block_size for kind, _ in kinds))
    units = np.arange(present, math.ceil(2 * reference), present, dtype=np.int64)
    bounds = _least_costs(kinds, units, reference)
    best: tuple[Fraction, int, CommonPage] | None = None
    for index in np.argsort(bounds, kind="stable"):
        if best is not None and bounds[index] > float(best[0]) + CLOSE:
            break
        unit = int(units[index])
        search = PageSearch([(kind.within(unit), count) for kind, count in kinds])
        page = search.best_for(reference)
        if page is None:
            continue
        cost = page.waste + unit / (2 * reference)
        if best is None or (cost, unit) < best[:2]:
            best = cost, unit, page
    return None if best is None or best[0] >= 1 else (best[2], best[1])


def _least_costs(
    kinds: Sequence[tuple[LayerKind, int]], units: Bytes, reference: Fraction
) -> npt.NDArray[np.float64]:
    """Return a lower bound of the cost for each match unit.

    A block has at most a match unit's tokens. A page has at least the bytes of the largest present
    one.
    """
    least = max(kind.least_page for kind, _ in kinds)
    content, taken = 0.0, np.zeros(len(units))
    for kind, count in kinds:
        held = float(kind.held(reference))
        per_token = kind.unit / kind.spec.block_size
        content += count * held * per_token
        taken += count * np.maximum(least, held * np.maximum(per_token, least / units))
    return 1 - content / taken + units / (2 * float(reference))


class PageSearch:
    """The common pages of some layers.

    Args:
        kinds: Each kind of layer and its number of layers.

    Attributes:
        least: Bytes of the largest page before planning, without padding. No common page is
            smaller.
        reach: Bytes of the largest page to consider. Its blocks hold the longest sequence.
    """

    def __init__(self, kinds: Sequence[tuple[LayerKind, int]]) -> None:
        self._kinds = kinds
        self._layers = sum(count for _, count in kinds)
        self._granularity = page_granularity(kind for kind, _ in kinds)
        self.least = max(kind.least_page for kind, _ in kinds)
        self.reach = max(self.least, *(kind.longest_page for kind, _ in kinds))
        most = [(kind.cap > 1, count, count * kind.cap * kind.unit) for kind, count in kinds]
        self._growing = sum(count for grows, count, _ in most if grows)
        self._most = sum(used for _, _, used in most)
        self._most_of_others = sum(used for grows, _, used in most if not grows)

    def best(self, highest: int, enough: Fraction, at_highest: bool) -> CommonPage | None:
        """Return the smallest page with little enough waste, otherwise the one with least waste.

        Its waste is at most that of the largest present page.

        Args:
            highest: Bytes of the largest page to choose. If no page up to there suits all layers,
                the next larger one that does is chosen.
            enough: The share of the pool that may be wasted.
            at_highest: Whether `highest` is known to suit all layers, which extends the reach.

        Returns:
            The page, of equal ones the smallest; None if no page within reach suits all layers.
        """
        low = high = self._round_up(self.least)
        highest = max(highest, low)
        present = max(kind.spec.page_size_bytes for kind, _ in self._kinds)
        for page in self._pages(self._common(present, present)):
            # vLLM's own rule takes this page and wastes no less.
            enough = min(enough, page.waste)
        self.reach = max(self.reach, highest if at_highest else low)
        best: CommonPage | None = None
        while low <= high:
            sizes = self._common(low, high)
            waste = 1 - self._used(sizes) / sizes / self._layers
            for page in self._pages(sizes[waste <= float(enough) + CLOSE]):
                if page.waste <= enough:
                    return page
            for page in self._pages(sizes[waste <= waste.min(initial=1) + CLOSE]):
                if best is None or page.waste < best.waste:
                    best = page
            low, high = high + 1, min(2 * high, self._limit(best, highest))
        while best is None and low <= self.reach:
            high = min(2 * low, self.reach)
            best = next(self._pages(self._common(low, high)), None)
            low = high + 1
        return best

    def best_for(self, request: Fraction) -> CommonPage | None:
        """Return the page with the least padding in a request's pages; None if none suits all.

        A page is at most as large as the longest blocks need; larger ones only add padding.

        Args:
            request: Tokens of the request.

        Returns:
            The page, of equal ones the smallest. Its waste is the padding's share of the request's
            pages.
        """
        sizes = self._common(self._round_up(self.least), self._round_up(self.reach))
        if not len(sizes):
            return None
        held = [kind.held(request) for kind, _ in self._kinds]
        taken = self._bytes_taken(sizes, [float(tokens) for tokens in held])
        sizes = sizes[taken <= taken.min() * (1 + CLOSE)]
        exact = self._bytes_taken(sizes, held)
        index = int(np.argmin(exact))
        content = sum(
            count * tokens * kind.unit / kind.spec.block_size
            for (kind, count), tokens in zip(self._kinds, held, strict=True)
        )
        (used,) = self._used(sizes[index : index + 1])
        return CommonPage(int(sizes[index]), int(used), 1 - content / exact[index])

    def _bytes_taken(self, sizes: Bytes, held: Sequence[float | Fraction]) -> npt.NDArray[Any]:
        """Return the bytes that a request's pages take, at least a page of every layer.

        Args:
            sizes: Bytes of the pages to compare.
            held: Tokens that each kind of layer holds: floats, or fractions for an exact result.
        """
        dtype = float if isinstance(held[0], float) else object
        pages = np.zeros(len(sizes), dtype)
        for (kind, count), tokens in zip(self._kinds, held, strict=True):
            block_tokens = (kind.blocks(sizes) * kind.spec.block_size).astype(dtype)
            pages += count * np.maximum(1, tokens / block_tokens)
        return pages * sizes.astype(dtype)

    def _pages(self, sizes: Bytes) -> Iterator[CommonPage]:
        for size, used in zip(sizes.tolist(), self._used(sizes).tolist(), strict=True):
            yield CommonPage(size, used, 1 - Fraction(used, size * self._layers))

    def _used(self, sizes: Bytes) -> Bytes:
        used = np.zeros(len(sizes), np.int64)
        for kind, count in self._kinds:
            used += count * kind.used(sizes)
        return used

    def _limit(self, best: CommonPage | None, highest: int) -> int:
        """Return the page above which none wastes less than the best one yet.

        All layers together use at most `most`. A page of T bytes also uses at most T for each
        layer that grows, plus what the others use at most.
        """
        if best is None:
            return min(highest, self.reach)
        limit = min(highest, self._most * best.size // best.used)
        ahead = best.used - self._growing * best.size
        if ahead > 0:
            limit = min(limit, self._most_of_others * best.size // ahead)
        return limit

    def _round_up(self, size: int) -> int:
        return -(-size // self._granularity) * self._granularity

    def _common(self, low: int, high: int) -> Bytes:
        """Return pages that suit all layers, ascending, with the best of any part of the range."""
        sizes = np.unique(np.concatenate(list(self._candidates(low, high))))
        suits = (sizes >= low) & (sizes <= high) & (sizes % self._granularity == 0)
        for kind, _ in self._kinds:
            suits &= kind.blocks(sizes) > 0
        return sizes[suits]

    def _candidates(self, low: int, high: int) -> Iterator[Bytes]:
        restricted = [kind for kind, _ in self._kinds if not kind.elastic]
        if not restricted:
            for steps in [np.array([low]), *(kind.steps(low, high) for kind, _ in self._kinds)]:
                yield -(-steps // self._granularity) * self._granularity
            return
        if whole := [kind.step for kind in restricted if isinstance(kind, WholeBlocks)]:
            unit = math.lcm(self._granularity, *whole)
            yield np.arange(-(-low // unit), high // unit + 1, dtype=np.int64) * unit
        else:
            yield min((kind.steps(low, high) for kind in restricted), key=len)
