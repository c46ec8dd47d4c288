# SPDX-License-Identifier: Apache-2.0
"""Statistics of the traffic: reuse by age, returning answers, and prefixes seen before."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum

import numpy as np

EDGES = np.array([0, *(1 << k for k in range(17))], dtype=np.float64)
"""Edges of the age ranges. Ages are counted in requests."""

PRIOR_WEIGHT = 20.0
"""The weight of the prior return rate, as a number of observed checkpoints, and of the prior factor
of a turn, as a number of returns."""

DOCUMENT_TOKENS = 2048
"""A prompt that adds at least this many tokens to its conversation has a document in it."""

_LOW, _HIGH = EDGES[:-1], EDGES[1:]
_WIDTH = _HIGH - _LOW
_PRIOR = 0.3 / ((_LOW + _HIGH) / 2 + 30)
"""The prior return rate falls with age, so the initial order is that of LRU."""


def age_range(age: int) -> int:
    """Return the index of the range that contains an age."""
    return min(age.bit_length(), len(_LOW) - 1)


class Turn(IntEnum):
    """How a prompt continues a conversation. Documents that are pasted in are seldom asked about
    again, and neither are edited prompts.
    """

    FIRST = 0
    """It continues no known conversation."""
    EDITED = 1
    """It is shorter than the previous prompt and its answer, so it does not repeat both."""
    MESSAGE = 2
    """It adds fewer than `DOCUMENT_TOKENS` to the previous prompt and its answer."""
    DOCUMENT = 3
    """It adds at least `DOCUMENT_TOKENS`."""

    @classmethod
    def of(cls, tokens: int, previous: int) -> Turn:
        """Return the turn of a prompt, whose previous turn had `previous` tokens with its answer.

        `previous` is 0 if no previous turn is known.
        """
        if not previous:
            return cls.FIRST
        growth = tokens - previous
        if growth < 0:
            return cls.EDITED
        return cls.MESSAGE if growth < DOCUMENT_TOKENS else cls.DOCUMENT


class ReuseCurve:
    """How the return rate of checkpoints of one kind depends on their age and on their turn.

    The rate in a range of ages is the number of returns in this range, divided by the total time
    that checkpoints spent in it (the estimate of a piecewise constant hazard). Evicted checkpoints
    count too, because a later request with their prefix is still observed.

    The rates of a turn are those of all turns, multiplied by a factor that is shrunk towards 1:

        factor(turn) = (returns of the turn + w) / (expected returns of the turn + w)

    with w = `PRIOR_WEIGHT`. The returns that the rates of all turns predict for the time that
    checkpoints of the turn spent are the expected returns.

    The rates determine the index of an age a. It is the maximum over all horizons of

        P(return before the horizon | age a, no return yet) / E(time until return or horizon).

    This is the Gittins index of a checkpoint that occupies memory until it is used or evicted: the
    best ratio of expected returns to the time in memory. The index may rise with age. If users take
    a while to answer, a young checkpoint is worth less than one that has waited.
    """

    def __init__(self, likelihood: float = 1.0) -> None:
        """Start with the prior return rate, multiplied by `likelihood`."""
        self._prior = likelihood * _PRIOR
        self._returns = np.zeros((len(Turn), len(_LOW)))
        self._time = np.zeros((len(Turn), len(_LOW)))
        self.update(())

    def record(self, turn: Turn, since: int, age: int, returned: bool) -> None:
        """Record the age that a checkpoint reached, and whether a request used it at that age.

        The checkpoint changed to this kind at the age `since`. Ages are in requests.
        """
        self._time[turn] += np.clip(age - _LOW, 0, _WIDTH) - np.clip(since - _LOW, 0, _WIDTH)
        if returned:
            self._returns[turn, age_range(age)] += 1

    def fade(self) -> None:
        """Halve the weight of earlier observations, because traffic changes."""
        self._returns /= 2
        self._time /= 2

    def update(self, waiting: Sequence[tuple[Turn, int, int]]) -> None:
        """Recompute the rates and the index, both of shape (turns, age ranges).

        `waiting` has each checkpoint's turn, its age when it changed to this kind, and its current
        age.
        """
        time = self._time.copy()
        if waiting:
            turns, *ages = np.asarray(waiting).T
            since, now = (np.clip(age[:, None] - _LOW, 0, _WIDTH) for age in ages)
            np.add.at(time, turns, now - since)
        weight = PRIOR_WEIGHT * _WIDTH
        rates = (self._returns.sum(axis=0) + self._prior * weight) / (time.sum(axis=0) + weight)
        expected = (time * rates).sum(axis=1)
        factors = (self._returns.sum(axis=1) + PRIOR_WEIGHT) / (expected + PRIOR_WEIGHT)
        self.rates = factors[:, None] * rates
        # In a range of width w and rate h, a share of 1 - exp(-hw) returns, and the mean time in
        # the range is (1 - exp(-hw)) / h.
        returning = -np.expm1(-self.rates * _WIDTH)
        index = np.empty_like(self.rates)
        for start in range(len(_LOW)):
            waits = np.cumprod(1 - returning[:, start:], axis=1)
            waits = np.concatenate((np.ones((len(Turn), 1)), waits[:, :-1]), axis=1)
            returns = waits * returning[:, start:]
            spent = np.cumsum(returns / self.rates[:, start:], axis=1)
            index[:, start] = (np.cumsum(returns, axis=1) / spent).max(axis=1)
        # Lists of floats are read faster than arrays.
        self.index: list[list[float]] = index.tolist()


class AnswerReturns:
    """How often the next turn of a conversation repeats the answer unchanged."""

    FADE = 1024
    """After this many turns, all earlier turns count half."""

    def __init__(self) -> None:
        self._returns, self._turns = 2.0, 4.0

    @property
    def rate(self) -> float:
        return self._returns / self._turns

    def record(self, came_back: bool) -> None:
        """Record whether the turn after an answer repeated that answer."""
        self._returns += came_back
        self._turns += 1
        if self._turns >= self.FADE:
            self._returns, self._turns = self._returns / 2, self._turns / 2


_WORDS = struct.Struct("<QQ")

BITS_PER_HASH = 16
"""At 16 bits and 6 probes, at most (1 - exp(-6/16))^6 = 0.1 % of lookups are false positives."""

_PROBES = np.arange(6, dtype=np.uint64)
_THREE, _SEVEN = np.uint64(3), np.uint64(7)
_BITS = np.left_shift(np.uint8(1), np.arange(8, dtype=np.uint8))


class _Generation:
    """A Bloom filter of hashes, and an exact set of the last hashes of requests."""

    def __init__(self, capacity: int) -> None:
        self.room = capacity
        self.ends: set[bytes] = set()
        self._mask = (1 << (capacity * BITS_PER_HASH - 1).bit_length()) - 1
        self._table = np.zeros((self._mask + 1) // 8, dtype=np.uint8)
        # A memoryview reads single bytes faster than an array does.
        self._bytes = self._table.data

    def add(self, hashes: Sequence[bytes]) -> None:
        # All hashes have the same length, because one function makes them.
        words = np.frombuffer(b"".join(hashes), dtype="<u8").reshape(len(hashes), -1)
        first, step = words[:, :1], words[:, 1:2]
        places = ((first + _PROBES * step) & self._mask).ravel()
        indices, bits = (places >> _THREE).view(np.int64), _BITS[places & _SEVEN]
        # If several bits go into one byte, `|=` sets only one of them. Repeating `|=` for the lost
        # bits is several times faster than `np.bitwise_or.at`, which would lose none.
        while len(indices):
            self._table[indices] |= bits
            lost = (self._table[indices] & bits) == 0
            indices, bits = indices[lost], bits[lost]
        self.room -= len(hashes)

    def has(self, first: int, step: int) -> bool:
        for probe in range(len(_PROBES)):
            place = (first + probe * step) & self._mask
            if not self._bytes[place >> 3] >> (place & 7) & 1:
                return False
        return True


class SeenPrefixes:
    """Remembers prefixes of recent requests, to detect where a prompt branches off from them.

    A third request will probably resume at such a branch point, so its state is worth keeping (the
    admission rule of Marconi, arXiv 2411.19379). The cache itself cannot detect branch points,
    because most blocks are evicted before the second request comes.

    Hashes are chained, so bisection finds the longest shared prefix. There are two generations.
    When the younger one is full, it replaces the older one. A false positive costs at most one
    unused checkpoint.
    """

    def __init__(self, capacity: int) -> None:
        """Start empty. A generation has room for `capacity` hashes, each in 2 to 4 bytes."""
        self.capacity = capacity
        self._young = self._old = _Generation(capacity)

    def add(self, hashes: Sequence[bytes], known: int = 0) -> None:
        """Add the hashes of a request's match units, and mark the last one as an end.

        The first `known` hashes were added before.
        """
        if not hashes:
            return
        new = hashes[known:]
        if len(new) > self._young.room:
            self._old, self._young = self._young, _Generation(self.capacity)
        if new:
            self._young.add(new)
        self._young.ends.add(bytes(hashes[-1]))

    def longest(self, hashes: Sequence[bytes], limit: int) -> int:
        """Return how many of a prompt's first `limit` hashes were seen before."""
        low, high = 0, min(limit, len(hashes))
        while low < high:
            middle = (low + high + 1) // 2
            # Hashes are uniformly distributed, so their first bytes can index the filter.
            first, step = _WORDS.unpack_from(hashes[middle - 1])
            if self._young.has(first, step) or self._old.has(first, step):
                low = middle
            else:
                high = middle - 1
        return low

    def discard_end(self, block_hash: bytes) -> None:
        """Unmark an end, because a request continued there. Another continuation is a branch."""
        self._young.ends.discard(bytes(block_hash))
        self._old.ends.discard(bytes(block_hash))

    def is_end(self, block_hash: bytes) -> bool:
        """Whether a request ended here and no request has continued from here yet."""
        return bytes(block_hash) in self._young.ends or bytes(block_hash) in self._old.ends
