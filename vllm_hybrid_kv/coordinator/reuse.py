# SPDX-License-Identifier: Apache-2.0
"""Learns from the traffic how likely a checkpoint is to be used again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

EDGES = np.array([0, *(1 << k for k in range(17))], dtype=np.float64)
"""Ages are counted in requests that came since, in ranges that double."""

PRIOR_WEIGHT = 20.0
"""How many checkpoints' lives the first guess weighs as much as."""

_LOW, _HIGH = EDGES[:-1], EDGES[1:]
_WIDTH = _HIGH - _LOW
_PRIOR = 0.3 / ((_LOW + _HIGH) / 2 + 30)
"""Before anything is known: the older, the less likely, which makes the order that of LRU."""


def age_range(age: int) -> int:
    """Return the index of the range of ages that an age is in."""
    return min(age.bit_length(), len(_LOW) - 1)


class ReuseCurve:
    """How the chance of a return depends on age, for checkpoints of one kind.

    The return rate of a range of ages is the number of returns at such ages divided by the time
    that checkpoints spent in it, returned or not (the estimate of a piecewise constant hazard).
    Checkpoints that were given up are watched like those that are there, for what matters is
    whether somebody comes.

    From the rates h_b follows the index of an age a: the greatest, over all horizons, of

        P(return before the horizon | age a, no return yet) / E(time until return or horizon).

    That is Gittins' index of a checkpoint that occupies its place until it is used or given up:
    the returns per unit of time that its place earns if it is kept as long as that pays. It may
    rise with age: where users take a while to answer, a young checkpoint is worth less than one
    that has waited.
    """

    def __init__(self, likely: float = 1.0) -> None:
        """Start with a guess.

        Args:
            likely: How likely a return is, compared with that of any checkpoint.
        """
        self._prior = likely * _PRIOR
        self._returns = np.zeros(len(_LOW))
        self._time = np.zeros(len(_LOW))
        self.update(())

    def record(self, since: int, age: int, returned: bool) -> None:
        """Count a checkpoint's wait that is over.

        Args:
            since: The age at which it became one of this kind, in requests.
            age: Its age at the end.
            returned: Whether a request came for it; else it is no longer watched, or has become
                one of another kind.
        """
        self._time += np.clip(age - _LOW, 0, _WIDTH) - np.clip(since - _LOW, 0, _WIDTH)
        if returned:
            self._returns[age_range(age)] += 1

    def fade(self) -> None:
        """Halve the weight of what was counted so far, for traffic changes."""
        self._returns /= 2
        self._time /= 2

    def update(self, waiting: Sequence[tuple[int, int]]) -> None:
        """Compute the index anew.

        Args:
            waiting: The checkpoints whose wait is not over: since what age they are of this kind,
                and their age now.
        """
        time = self._time
        if waiting:
            ages = np.asarray(waiting, dtype=np.float64)[:, :, None]
            since, now = np.clip(ages - _LOW, 0, _WIDTH).sum(axis=0)
            time = time + now - since
        weight = PRIOR_WEIGHT * _WIDTH
        self.rates = (self._returns + self._prior * weight) / (time + weight)
        # Within a range of width w at rate h: 1 - exp(-hw) return, after (1 - exp(-hw)) / h.
        returning = -np.expm1(-self.rates * _WIDTH)
        self.index = [0.0] * len(_LOW)
        for start in range(len(_LOW)):
            waits = np.concatenate(([1.0], np.cumprod(1 - returning[start:])[:-1]))
            returns = np.cumsum(waits * returning[start:])
            spent = np.cumsum(waits * returning[start:] / self.rates[start:])
            self.index[start] = float((returns / spent).max())
