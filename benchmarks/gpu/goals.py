# SPDX-License-Identifier: Apache-2.0
"""The goals beside what was measured. Arithmetic only.

A goal is judged by the shape that is furthest from it, and only by shapes that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.shapes import GOAL_LENGTH

Result = Mapping[str, Any]

OURS, ONE_TOKEN, STOCK = "ours", "ours, one token", "stock k8v4"
BF16 = (
    "unified bf16", "FlashAttention bf16", "flash-attn bf16", "FlashInfer bf16",
    "torch's FlashAttention 2 bf16",
)  # fmt: skip
FP8 = ("unified fp8", "FlashAttention fp8", "FlashInfer fp8")
FLASH_BF16 = ("FlashAttention bf16", "flash-attn bf16", "torch's FlashAttention 2 bf16")


@dataclass(frozen=True)
class Goal:
    """A number that a shape has, and the bound that it is held to.

    Attributes:
        text: What is wanted, with the bound.
        section: Whose results it is about.
        bound: The number wanted.
        at_most: Whether the number may not exceed the bound; else it may not fall below.
        concerns: Whether a result is one that the goal is about.
        number: The number of a result; None where who is compared with was not there.
    """

    text: str
    section: str
    bound: float
    concerns: Callable[[Result], bool]
    number: Callable[[Result], float | None]
    at_most: bool = False

    def met_by(self, number: float) -> bool:
        """Return whether a number is within the bound."""
        return number <= self.bound if self.at_most else number >= self.bound


@dataclass(frozen=True)
class Verdict:
    """A goal beside what was measured.

    Attributes:
        goal: What is wanted.
        measured: The number furthest from it; None if none was measured.
        best: The number best for it, likewise.
        where: The shape of `measured`.
        shapes: Shapes that it was judged by.
        met: Whether all of them are within the bound; None if none was measured.
    """

    goal: str
    measured: float | None
    best: float | None
    where: str
    shapes: int
    met: bool | None


def _over_ours(result: Result, names: Iterable[str]) -> float | None:
    """Times as long as ours that the fastest of some contenders took."""
    medians = result.get("times_ours", {})
    ratios = [medians[name]["median"] for name in names if name in medians]
    return min(ratios, default=None)


def _inverse(number: float | None) -> float | None:
    return None if number is None else 1 / number


def _share_of_copy(result: Result) -> float | None:
    achieved = result.get("achieved", {}).get(OURS)
    return None if achieved is None else float(achieved["share_of_copy"])


def _long(result: Result) -> bool:
    return bool(result["shape"]["length"] == GOAL_LENGTH)


def _long_batches(result: Result) -> bool:
    return _long(result) and result["shape"]["batch"] >= 8


def _long_alone(result: Result) -> bool:
    return _long(result) and result["shape"]["batch"] == 1


def _any(result: Result) -> bool:
    return True


def _large_store(result: Result) -> bool:
    return bool(result["shape"]["length"] >= 4096)


GOALS = (
    Goal("decode at 32k, batch 8 and more: at least 75 % of copy bandwidth", "decode",
         0.75, _long_batches, _share_of_copy),
    Goal("decode at 32k, batch 8 and more: at least 7 times stock k8v4", "decode",
         7.0, _long_batches, lambda r: _over_ours(r, [STOCK])),
    Goal("decode at 32k, batch 8 and more: at least 2 times the fastest bf16", "decode",
         2.0, _long_batches, lambda r: _over_ours(r, BF16)),
    Goal("decode at 32k, batch 8 and more: at least 1.25 times the fastest fp8", "decode",
         1.25, _long_batches, lambda r: _over_ours(r, FP8)),
    Goal("decode at 32k, batch 1: not slower than the fastest fp8", "decode",
         1.0, _long_alone, lambda r: _over_ours(r, FP8)),
    Goal("verification of 4 tokens: at most 1.3 times one token", "verify",
         1.3, _any, lambda r: _inverse(_over_ours(r, [ONE_TOKEN])), at_most=True),
    Goal("chunked prefill of 2048: at least 3 times stock k8v4", "chunked",
         3.0, _any, lambda r: _over_ours(r, [STOCK])),
    Goal("chunked prefill of 2048: at least 60 % of FlashAttention on bf16", "chunked",
         0.6, _any, lambda r: _over_ours(r, FLASH_BF16)),
    Goal("store of 4096 tokens and more: at least 60 % of copy bandwidth", "store",
         0.6, _large_store, _share_of_copy),
)  # fmt: skip


def name_of(result: Result) -> str:
    """Return a result's shape in words."""
    shape = result["shape"]
    return f"{shape['heads']}, batch {shape['batch']}, {shape['length']} tokens"


def verdict(goal: Goal, results: Iterable[Result]) -> Verdict:
    """Hold a goal against the results that it concerns.

    Args:
        goal: What is wanted.
        results: All that was measured.
    """
    found = [
        (number, name_of(result))
        for result in results
        if result["section"] == goal.section and goal.concerns(result)
        if (number := goal.number(result)) is not None
    ]
    if not found:
        return Verdict(goal.text, None, None, "", 0, None)
    found.sort(reverse=goal.at_most)
    (worst, where), (best, _) = found[0], found[-1]
    return Verdict(goal.text, worst, best, where, len(found), goal.met_by(worst))


def verdicts(results: Iterable[Result]) -> list[Verdict]:
    """Hold every goal against all that was measured."""
    results = list(results)
    return [verdict(goal, results) for goal in GOALS]
