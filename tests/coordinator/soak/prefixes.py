# SPDX-License-Identifier: Apache-2.0
"""Names for prefixes of tokens, so that what a block holds can be compared by number."""

from __future__ import annotations

from collections.abc import Sequence

EMPTY = 0
"""The prefix of no tokens."""

DRAFT = -1
"""What no request may read: made from tokens that were only guessed."""

LOST = -2
"""What no request may read: a load that failed was to write here."""


class Prefixes:
    """Numbers the prefixes of a world; equal tokens have equal numbers.

    K and V at a position depend on all tokens up to it, and so does a state: a number is all that
    has to be known of them.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, int], int] = {}
        self._parents: list[int] = [EMPTY]

    def extend(self, numbers: list[int], tokens: Sequence[int]) -> None:
        """Bring the numbers of a sequence's prefixes up to its length.

        Args:
            numbers: Those of its first prefixes, of one token on.
            tokens: The whole sequence.
        """
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
        """Return the last prefixes on the way to one, itself at the end.

        Args:
            prefix: A prefix of at least `count` tokens.
            count: How many.
        """
        path = []
        for _ in range(count):
            path.append(prefix)
            prefix = self._parents[prefix]
        return path[::-1]
