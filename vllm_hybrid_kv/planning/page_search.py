# SPDX-License-Identifier: Apache-2.0
"""The search for a common page. `docs/planning.md` has the proof that it overlooks none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from vllm_hybrid_kv.planning.page_kinds import Bytes, LayerKind, RowAligned, page_granularity


@dataclass(frozen=True)
class Page:
    """A common page.

    Attributes:
        size: Its bytes.
        used: Bytes that can hold tokens or a state, summed over one page of every layer.
        waste: The share of the pool that is padding.
    """

    size: int
    used: int
    waste: Fraction


def weighed_page(
    kinds: Sequence[tuple[LayerKind, int]], reference: Fraction
) -> tuple[Page, int] | None:
    """Return the page with the lowest cost, and the match unit that its blocks divide.

    The cost is the share of a reference request's pages that is padding, plus
    `match_unit / (2 * reference)`, the share of it that a cache hit misses on average because hits
    end at multiples of the unit.

    Args:
        kinds: What the layers can do, and how many there are of each kind.
        reference: Tokens of the request.

    Returns:
        The page, with the share that the request leaves as its waste, and the unit in tokens; of
        equal costs the one with the smallest unit. None if no plan costs less than 1.
    """
    present = math.lcm(*(kind.spec.block_size for kind, _ in kinds))
    units = np.arange(present, math.ceil(2 * reference), present, dtype=np.int64)
    bounds = _least_costs(kinds, units, reference)
    best: tuple[Fraction, int, Page] | None = None
    for index in np.argsort(bounds, kind="stable"):
        # Bounds are rounded.
        if best is not None and bounds[index] > float(best[0]) + 1e-12:
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
    """Return for each match unit a cost that no plan is below.

    A block has at most a unit's tokens, and a page at least the bytes of the largest present one.
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

    Attributes:
        least: Bytes that the largest page holds before planning. No common page is smaller.
        reach: Bytes up to which a page may be. From there on every block holds the longest
            sequence.
    """

    def __init__(self, kinds: Sequence[tuple[LayerKind, int]]) -> None:
        """Prepare.

        Args:
            kinds: What the layers can do, and how many there are of each kind.
        """
        self._kinds = kinds
        self._layers = sum(count for _, count in self._kinds)
        self._granularity = page_granularity(kind for kind, _ in kinds)
        self.least = max(kind.least_page for kind, _ in self._kinds)
        self.reach = max(self.least, *(kind.longest_page for kind, _ in self._kinds))
        most = [(kind.cap > 1, count, count * kind.cap * kind.unit) for kind, count in self._kinds]
        self._growing = sum(count for grows, count, _ in most if grows)
        self._most = sum(used for _, _, used in most)
        self._most_of_others = sum(used for grows, _, used in most if not grows)

    def best(self, highest: int, enough: Fraction, at_highest: bool) -> Page | None:
        """Return the smallest page that wastes no more than enough, else the one that wastes least.

        Its waste is at most that of the largest present page.

        Args:
            highest: Bytes up to which there is a choice. Where no page up to there suits all
                layers, it is the next one that does.
            enough: The share of the pool.
            at_highest: Whether `highest` is known to suit all layers, which extends the reach.

        Returns:
            The page, of equals the smallest; None where none within reach suits all layers.
        """
        low = high = -(-self.least // self._granularity) * self._granularity
        highest = max(highest, low)
        present = max(kind.spec.page_size_bytes for kind, _ in self._kinds)
        for size in self._common(present, present):
            # What vLLM's own rule has at least, whose page this is.
            enough = min(enough, self._page(size, self._used(np.array([size]))[0]).waste)
        self.reach = max(self.reach, highest if at_highest else low)
        best: Page | None = None
        while low <= high:
            pages = self._common(low, high)
            used = self._used(pages)
            waste = 1 - used / pages / self._layers
            # Shares are rounded; what is close is compared exactly.
            for index in np.flatnonzero(waste <= float(enough) + 1e-12):
                page = self._page(pages[index], used[index])
                if page.waste <= enough:
                    return page
            for index in np.flatnonzero(waste <= waste.min(initial=1) + 1e-12):
                page = self._page(pages[index], used[index])
                if best is None or page.waste < best.waste:
                    best = page
            low, high = high + 1, min(2 * high, self._limit(best, highest))
        while best is None and low <= self.reach:
            high = min(2 * low, self.reach)
            for size in self._common(low, high)[:1]:
                best = self._page(size, self._used(np.array([size]))[0])
            low = high + 1
        return best

    def best_for(self, request: Fraction) -> Page | None:
        """Return the page of which a request leaves the smallest share, None if none suits all.

        No page is larger than what the longest blocks fill. Larger ones only add padding.

        Args:
            request: Its tokens.

        Returns:
            Of equals the smallest, with the share as its waste. A layer takes at least one page.
        """
        low, high = (-(-size // self._granularity) for size in (self.least, self.reach))
        sizes = self._common(low * self._granularity, high * self._granularity)
        if not len(sizes):
            return None
        held = [(kind, count, kind.held(request)) for kind, count in self._kinds]
        content = sum(
            count * tokens * kind.unit / kind.spec.block_size for kind, count, tokens in held
        )
        taken = np.zeros(len(sizes))
        for kind, count, tokens in held:
            blocks = kind.blocks(sizes) * kind.spec.block_size
            taken += count * sizes * np.maximum(1, float(tokens) / blocks)
        best: Page | None = None
        for size in sizes[taken <= taken.min() * (1 + 1e-12)]:
            one = np.array([size])
            pages = sum(
                count * max(Fraction(1), tokens / int(kind.blocks(one)[0] * kind.spec.block_size))
                for kind, count, tokens in held
            )
            waste = 1 - content / (pages * int(size))
            if best is None or waste < best.waste:
                best = Page(int(size), int(self._used(one)[0]), waste)
        return best

    def _page(self, size: np.int64, used: np.int64) -> Page:
        waste = 1 - Fraction(int(used), int(size) * self._layers)
        return Page(int(size), int(used), waste)

    def _used(self, pages: Bytes) -> Bytes:
        used = np.zeros(len(pages), np.int64)
        for kind, count in self._kinds:
            used += count * kind.used(pages)
        return used

    def _limit(self, best: Page | None, highest: int) -> int:
        """Return the page above which none wastes less than the best so far.

        A page of T bytes uses no more than `most` in all, and no more than T of each layer that
        grows with what the others use at most.
        """
        if best is None:
            return min(highest, self.reach)
        limit = min(highest, self._most * best.size // best.used)
        ahead = best.used - self._growing * best.size
        if ahead > 0:
            limit = min(limit, self._most_of_others * best.size // ahead)
        return limit

    def _common(self, low: int, high: int) -> Bytes:
        """Return pages that suit all layers, ascending: the best of any part of the range."""
        pages = np.unique(np.concatenate(list(self._candidates(low, high))))
        suits = (pages >= low) & (pages <= high) & (pages % self._granularity == 0)
        for kind, _ in self._kinds:
            suits &= kind.blocks(pages) > 0
        return pages[suits]

    def _candidates(self, low: int, high: int) -> Iterator[Bytes]:
        restricted = [kind for kind, _ in self._kinds if not kind.elastic]
        if not restricted:
            for steps in [np.array([low]), *(kind.steps(low, high) for kind, _ in self._kinds)]:
                yield -(-steps // self._granularity) * self._granularity
            return
        whole = [
            kind.spec.page_size_bytes
            for kind in restricted
            if isinstance(kind, RowAligned) and kind.alignment is None
        ]
        if whole:
            unit = math.lcm(self._granularity, *whole)
            yield np.arange(-(-low // unit), high // unit + 1, dtype=np.int64) * unit
        else:
            yield min((kind.steps(low, high) for kind in restricted), key=len)
