# SPDX-License-Identifier: Apache-2.0
"""Define the goals, and compare measurements with them. Arithmetic only.

A goal is met if the worst measured shape meets it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks.gpu.shapes import LONG

Result = Mapping[str, Any]

OURS, ONE_TOKEN, STOCK = "ours", "ours, one token", "stock k8v4"
IN_VLLM, PARTS_ALONE = "ours in vLLM", ("ours, decodes alone", "ours, prefills alone")
FLASH_BF16 = ("FlashAttention bf16", "torch's FlashAttention 2 bf16")
BF16 = ("unified bf16", *FLASH_BF16)
FP8 = ("unified fp8", "FlashAttention fp8")


class Goal(NamedTuple):
    """A bound for a number that is computed from each result.

    Attributes:
        text: The goal, with the bound.
        section: The section whose results count.
        bound: The smallest number that meets the goal, or with `at_most` the largest.
        concerns: Says whether a result of this shape (`Shape.as_dict`) counts.
        number: Computes the number; None if the contender to compare with is missing.
        at_most: Whether the bound is an upper bound.
    """

    text: str
    section: str
    bound: float
    concerns: Callable[[Mapping[str, Any]], bool]
    number: Callable[[Result], float | None]
    at_most: bool = False


def _speedup(*names: str) -> Callable[[Result], float | None]:
    """Make a goal's `number`: the time of the fastest of some contenders, divided by ours."""

    def number(result: Result) -> float | None:
        ratios = result.get("times_ours", {})
        return min((ratios[name]["median"] for name in names if name in ratios), default=None)

    return number


def _slowdown_over_one_token(result: Result) -> float | None:
    one_token = _speedup(ONE_TOKEN)(result)
    return None if one_token is None else 1 / one_token


def _slowdown_over_parts_alone(result: Result) -> float | None:
    ratios = result.get("times_ours", {})
    if not all(name in ratios for name in PARTS_ALONE):
        return None
    # vLLM calls the backend, which may launch decodes and prefills by themselves.
    whole: float = ratios[IN_VLLM]["median"] if IN_VLLM in ratios else 1.0
    return whole / sum(ratios[name]["median"] for name in PARTS_ALONE)


def _speedup_in_vllm(*names: str) -> Callable[[Result], float | None]:
    """Like `_speedup`, for our backend if it was measured."""

    def number(result: Result) -> float | None:
        speedup = _speedup(*names)(result)
        backend = result.get("times_ours", {}).get(IN_VLLM)
        return speedup if speedup is None or backend is None else speedup / backend["median"]

    return number


def _share_of_copy(result: Result) -> float | None:
    share: float | None = result.get("achieved", {}).get(OURS, {}).get("share_of_copy")
    return share


def _any(shape: Mapping[str, Any]) -> bool:
    return True


def _long_batches(shape: Mapping[str, Any]) -> bool:
    return 8 <= shape["batch"] <= 64 and shape["longest"] in (LONG, 2 * LONG)


def _long_alone(shape: Mapping[str, Any]) -> bool:
    return bool(shape["longest"] == LONG and shape["batch"] == 1)


GOALS = (
    Goal("decode of long requests, batch 8 to 64: at least 85 % of copy bandwidth", "decode",
         0.85, _long_batches, _share_of_copy),
    Goal("decode of long requests, batch 8 to 64: at least 7 times stock k8v4", "decode",
         7.0, _long_batches, _speedup(STOCK)),
    Goal("decode of long requests, batch 8 to 64: at least 2 times the fastest bf16", "decode",
         2.0, _long_batches, _speedup(*BF16)),
    Goal("decode of long requests, batch 8 to 64: at least 1.25 times the fastest fp8", "decode",
         1.25, _long_batches, _speedup(*FP8)),
    Goal("decode of one long request: not slower than the fastest fp8", "decode",
         1.0, _long_alone, _speedup(*FP8)),
    Goal("mixed batch: at most 1.15 times its decodes and prefills alone", "mixed",
         1.15, _any, _slowdown_over_parts_alone, at_most=True),
    Goal("verification of 4 tokens: at most 1.2 times one token", "verify",
         1.2, _any, _slowdown_over_one_token, at_most=True),
    Goal("chunked prefill of 2048: at least 3 times stock k8v4", "chunked",
         3.0, _any, _speedup_in_vllm(STOCK)),
    Goal("chunked prefill of 2048: at least 85 % of FlashAttention on bf16", "chunked",
         0.85, _any, _speedup_in_vllm(*FLASH_BF16)),
    Goal("store of 4096 tokens and more: at least 60 % of copy bandwidth", "store",
         0.6, lambda shape: bool(shape["longest"] >= 4096), _share_of_copy),
)  # fmt: skip


def verdict(goal: Goal, results: Iterable[Result]) -> dict[str, Any]:
    """Compare a goal with the results that it concerns.

    Returns:
        The number furthest from the goal, its shape, the best number, the number of shapes, and
        whether the goal is met. Without measured shapes, their number is 0 and the rest is None.
    """
    found = [
        (number, "{heads}, batch {batch}, {tokens} tokens".format(**result["shape"]))
        for result in results
        if result["section"] == goal.section and goal.concerns(result["shape"])
        if (number := goal.number(result)) is not None
    ]
    found.sort(reverse=goal.at_most)
    (worst, where), (best, _) = (found[0], found[-1]) if found else ((None, None), (None, None))
    met = None if worst is None else worst <= goal.bound if goal.at_most else worst >= goal.bound
    return {
        "goal": goal.text, "measured": worst, "best": best, "where": where,
        "shapes": len(found), "met": met,
    }  # fmt: skip
