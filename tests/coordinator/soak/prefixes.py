# SPDX-License-Identifier: Apache-2.0
"""Number the prefixes of token sequences, so that block contents can be compared as numbers."""

from __future__ import annotations

from collections.abc import Sequence

EMPTY = 0
"""The number of the empty prefix."""

DRAFT = -1
"""Content that was computed from draft tokens. No request may read it."""

LOST = -2
"""Content that a failed load wrote. No request may read it."""


class Prefixes:
    """Gives each prefix in a world a number. Equal prefixes have equal numbers.

    K, V and the state at a position depend on all tokens up to this position. The number of that
    prefix therefore represents them.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._parents: list[int] = [EMPTY]

    def extend(self, numbers: list[int], tokens: Sequence[int]) -> None:
        """Append to `numbers` until it has the numbers of all prefixes of a sequence."""
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
        """Return a prefix and the `count - 1` next shorter prefixes, the longest at the end."""
        path = []
        for _ in range(count):
            path.append(prefix)
            prefix = self._parents[prefix]
        return path[::-1]
