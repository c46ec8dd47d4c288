# SPDX-License-Identifier: Apache-2.0
"""Numbers prefixes of tokens, so that contents of blocks can be compared by number."""

from __future__ import annotations

from collections.abc import Sequence

EMPTY = 0
"""The prefix of no tokens."""

DRAFT = -1
"""Computed from draft tokens: no request may read it."""

LOST = -2
"""Written by a failed load: no request may read it."""


class Prefixes:
    """Numbers the prefixes of a world: equal tokens have equal numbers.

    K and V at a position depend on all tokens up to it, and so does a state. So a number represents
    them.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._parents: list[int] = [EMPTY]

    def extend(self, numbers: list[int], tokens: Sequence[int]) -> None:
        """Append to the numbers of a sequence's prefixes, up to all of its tokens."""
        last = numbers[-1] if numbers else EMPTY
        for token in tokens[len(numbers) :]:
            last = self.child(last, token)
            numbers.append(last)

    def child(self, prefix: int, token: int) -> int:
        """Return the number of a prefix with one more token."""
        number = self._numbers.setdefault((prefix, token), len(self._parents))
        if number == len(self._parents):
            self._parents.append(prefix)
        return number

    def path(self, prefix: int, count: int) -> list[int]:
        """Return the last `count` prefixes of a prefix, the longest at the end."""
        path = []
        for _ in range(count):
            path.append(prefix)
            prefix = self._parents[prefix]
        return path[::-1]
