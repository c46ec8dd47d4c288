# SPDX-License-Identifier: Apache-2.0
"""Remembers which prefixes requests had, long after the blocks of most of them are gone."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

_WORDS = struct.Struct("<QQ")

PROBES = 6
"""Bits that stand for one hash."""

BITS_PER_HASH = 16
"""A full table has at most (1 - exp(-6/16))^6 = 0.1 % false positives."""


_PROBES = np.arange(PROBES, dtype=np.uint64)
_THREE, _SEVEN = np.uint64(3), np.uint64(7)
_BITS = np.left_shift(np.uint8(1), np.arange(8, dtype=np.uint8))


class _Generation:
    """A Bloom filter of hashes, and the ends of prompts and answers among them."""

    def __init__(self, capacity: int) -> None:
        self.room = capacity
        self.ends: set[bytes] = set()
        self._mask = (1 << (capacity * BITS_PER_HASH - 1).bit_length()) - 1
        self._table = np.zeros((self._mask + 1) // 8, dtype=np.uint8)
        # One byte is read faster through it than from an array.
        self._bytes = self._table.data

    def add(self, hashes: Sequence[bytes]) -> None:
        # All are as long as the first: they come from one hash function.
        words = np.frombuffer(b"".join(hashes), dtype="<u8").reshape(len(hashes), -1)
        first, step = words[:, :1], words[:, 1:2]
        places = ((first + _PROBES * step) & self._mask).ravel()
        indices, bits = (places >> _THREE).view(np.int64), _BITS[places & _SEVEN]
        # Of bits that go into one byte an assignment keeps only one. `np.bitwise_or.at` keeps all,
        # and takes several times as long as assigning again what was lost, if anything.
        while len(indices):
            self._table[indices] |= bits
            lost = (self._table[indices] & bits) == 0
            indices, bits = indices[lost], bits[lost]
        self.room -= len(hashes)

    def has(self, first: int, step: int) -> bool:
        for probe in range(PROBES):
            place = (first + probe * step) & self._mask
            if not self._bytes[place >> 3] >> (place & 7) & 1:
                return False
        return True


class SeenPrefixes:
    """The prefixes of recent requests, to find where a prompt leaves one that came before.

    That place is a branch point: whoever comes third resumes there, so that its state is worth
    keeping (the admission rule of Marconi, arXiv 2411.19379). The cache itself cannot tell, for
    it has given up most blocks before a second request comes.

    Hashes are chained, so what a prompt shares with those before it is a prefix of its hashes,
    whose end is found by bisection. They are kept in two generations: when the younger is full it
    becomes the older, and what was the older is forgotten. Should a hash be taken for one that
    was seen, the worst that follows is a checkpoint that nobody uses.
    """

    def __init__(self, capacity: int) -> None:
        """Remember nothing yet.

        Args:
            capacity: Hashes of one generation, in 2 to 4 bytes each.
        """
        self._capacity = capacity
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._young = _Generation(self._capacity)
        self._old = self._young

    def add(self, hashes: Sequence[bytes], known: int = 0) -> None:
        """Remember a request, and that it ended where its hashes do.

        Args:
            hashes: The chained hashes of its whole prefix match units, in order.
            known: How many of them need not be entered again.
        """
        if not hashes:
            return
        new = hashes[known:]
        if len(new) > self._young.room:
            self._old, self._young = self._young, _Generation(self._capacity)
        if new:
            self._young.add(new)
        self._young.ends.add(bytes(hashes[-1]))

    def longest(self, hashes: Sequence[bytes], limit: int) -> int:
        """Return how many leading hashes of a prompt were seen before.

        Args:
            hashes: The prompt's.
            limit: How many of them count at most.
        """
        low, high = 0, min(limit, len(hashes))
        while low < high:
            middle = (low + high + 1) // 2
            # Hashes are evenly spread, so that their own first bytes serve for the filter's.
            first, step = _WORDS.unpack_from(hashes[middle - 1])
            if self._young.has(first, step) or self._old.has(first, step):
                low = middle
            else:
                high = middle - 1
        return low

    def pass_by(self, block_hash: bytes) -> None:
        """Remember that a request went on where another ended: the next to do so branches off."""
        self._young.ends.discard(bytes(block_hash))
        self._old.ends.discard(bytes(block_hash))

    def ended(self, block_hash: bytes) -> bool:
        """Whether a request ended with a hash: what goes on from there need not be a branch."""
        return bytes(block_hash) in self._young.ends or bytes(block_hash) in self._old.ends
