# SPDX-License-Identifier: Apache-2.0
"""Searches for the best page that suits all layers. `docs/planning.md` has the proof."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_hybrid_kv.planning.page_kinds import (
    Bytes,
    LayerKind,
    WholeBlocks,
    multiples,
    page_granularity,
)

Kinds = Sequence[tuple[LayerKind, int]]
"""Each kind of layer, and how many layers it has."""

Shares = npt.NDArray[np.float64]

DIGITS = 12
"""Costs and sums that are equal to this many decimals count as equal."""


class CommonPage(NamedTuple):
    """The bytes of a page that suits all layers, and the share of a pool that is not padding."""

    size: int
    filled: float


def cheapest_page(kinds: Kinds, reference: float) -> tuple[CommonPage, int] | None:
    """Return the page with the lowest cost, and the match unit that its blocks divide.

    The cost is the share of a reference request's pages that is padding, plus
    `match_unit / (2 * reference)`: the share of the request that a cache hit misses on average,
    because hits end at multiples of the match unit.

    If costs are equal, the smallest match unit wins. Return None if no plan costs less than 1.
    """
    present = math.lcm(*(kind.spec.block_size for kind, _ in kinds))
    units = np.arange(present, math.ceil(2 * reference), present)
    bounds = _least_costs(kinds, units, reference)
    lowest, best = (1.0, 0), None
    for index in np.argsort(bounds, kind="stable"):
        if round(bounds[index], DIGITS) > lowest[0]:
            break
        unit = int(units[index])
        page = PageSearch([(kind.within(unit), count) for kind, count in kinds]).best_for(reference)
        if page is None:
            continue
        cost = round(1 - page.filled + unit / (2 * reference), DIGITS), unit
        if cost < lowest:
            lowest, best = cost, (page, unit)
    return best


def _least_costs(kinds: Kinds, units: Bytes, reference: float) -> Shares:
    """Return a lower bound of the cost for each match unit, computed for blocks of that length."""
    least = max(kind.least_page for kind, _ in kinds)
    content, taken = 0.0, np.zeros(len(units))
    for kind, count in kinds:
        held = kind.held(reference)
        per_token = kind.unit / kind.spec.block_size
        content += count * held * per_token
        taken += count * np.maximum(least, held * np.maximum(per_token, least / units))
    return 1 - content / taken + units / (2 * reference)


class PageSearch:
    """Searches for common pages: pages that suit all given layers.

    Attributes:
        least: Bytes of the largest page before planning, without padding. No common page is
            smaller.
        reach: Bytes of the largest page to consider. Its blocks hold the longest sequence.
    """

    def __init__(self, kinds: Kinds) -> None:
        self._kinds = kinds
        self._layers = sum(count for _, count in kinds)
        self._granularity = page_granularity([kind.spec for kind, _ in kinds])
        self.least = max(kind.least_page for kind, _ in kinds)
        self.reach = max(self.least, *(kind.longest_page for kind, _ in kinds))

    def best(self, highest: int, enough: float, at_highest: bool) -> CommonPage | None:
        """Return the smallest page that fills enough of the pool, or else the page that fills most.

        The page fills at least as much as the largest page before planning, if that suits all
        layers. Return None if no page within reach suits all layers.

        Args:
            highest: Bytes of the largest page to choose. If no page up to this size suits all
                layers, the next larger page that does is chosen.
            enough: The share of the pool that must be filled.
            at_highest: Whether `highest` is known to suit all layers. If so, it is within reach.
        """
        low = high = self._round_up(self.least)
        highest = max(highest, low)
        # Waste no more than vLLM's own rule, which takes the largest page before planning.
        present = max(kind.spec.page_size_bytes for kind, _ in self._kinds)
        enough = max([enough, *self._filled(self._common(present, present))])
        self.reach = max(self.reach, highest if at_highest else low)
        best: CommonPage | None = None
        while low <= high:
            sizes = self._common(low, high)
            filled = self._filled(sizes)
            if len(sizes):
                at = int(np.argmax(np.minimum(filled, enough)))
                if best is None or filled[at] > best.filled:
                    best = CommonPage(int(sizes[at]), float(filled[at]))
                if best.filled >= enough:
                    return best
            low, high = high + 1, min(2 * high, self._limit(best, highest))
        while best is None and low <= self.reach:
            high = min(2 * low, self.reach)
            if len(sizes := self._common(low, high)):
                best = CommonPage(int(sizes[0]), float(self._filled(sizes[:1])[0]))
            low = high + 1
        return best

    def best_for(self, request: float) -> CommonPage | None:
        """Return the smallest page of those that waste least in one request; None if no page suits.

        Pages above `reach` are left out, because they only add padding.
        """
        sizes = self._common(self._round_up(self.least), self._round_up(self.reach))
        if not len(sizes):
            return None
        content, taken = 0.0, np.zeros(len(sizes))
        for kind, count in self._kinds:
            held = kind.held(request)
            block_size = kind.spec.block_size
            content += count * held * kind.unit / block_size
            taken += count * np.maximum(1, held / (kind.blocks(sizes) * block_size)) * sizes
        at = int(np.argmax(taken <= taken.min() * (1 + 10**-DIGITS)))
        return CommonPage(int(sizes[at]), content / float(taken[at]))

    def _filled(self, sizes: Bytes) -> Shares:
        used = np.zeros(len(sizes), np.int64)
        for kind, count in self._kinds:
            used += count * kind.used(sizes)
        return used / (sizes * self._layers)

    def _limit(self, best: CommonPage | None, highest: int) -> int:
        """Return the size above which no page wastes less than the best page found.

        All layers together use at most `most` bytes. With pages of T bytes, each layer that grows
        uses at most T, and the other layers together use at most `most_of_others`.
        """
        if best is None:
            return min(highest, self.reach)
        most = most_of_others = growing = 0
        for kind, count in self._kinds:
            most += count * kind.cap * kind.unit
            if kind.cap > 1:
                growing += count
            else:
                most_of_others += count * kind.unit
        used = best.filled * self._layers
        limit = min(highest, int(most / used))
        return limit if used <= growing else min(limit, int(most_of_others / (used - growing)))

    def _round_up(self, size: int) -> int:
        return -(-size // self._granularity) * self._granularity

    def _common(self, low: int, high: int) -> Bytes:
        """Return pages that suit all layers, ascending; one of them has the least padding."""
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
        elif whole := [kind.least_page for kind in restricted if isinstance(kind, WholeBlocks)]:
            yield multiples(math.lcm(self._granularity, *whole), low, high)
        else:
            yield min((kind.steps(low, high) for kind in restricted), key=len)
