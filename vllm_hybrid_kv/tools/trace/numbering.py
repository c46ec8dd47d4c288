# SPDX-License-Identifier: Apache-2.0
"""Requests with their token ids, and the numbers that replace the token ids in a trace."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vllm_hybrid_kv.tools.replay.trace import TracedRequest


@dataclass(frozen=True)
class Recorded:
    """One recorded request.

    Attributes:
        timestamp: The arrival in milliseconds.
        prompt: Token ids.
        answer_tokens: Tokens of the answer, at least 1.
    """

    timestamp: float
    prompt: Sequence[int]
    answer_tokens: int


def numbered(
    requests: Iterable[Recorded], start_ms: float, block_size: int
) -> Iterator[TracedRequest]:
    """Replace each block of a prompt by a number, and count times from `start_ms`.

    A block has the number of an earlier block if the prompts are equal up to its end. Otherwise it
    gets the next number. So a trace tells which prompts share a prefix, but not its tokens.
    """
    numbers: dict[tuple[int, bytes], int] = {}
    for request in requests:
        ids: list[int] = []
        for start in range(0, len(request.prompt), block_size):
            block = array("q", request.prompt[start : start + block_size]).tobytes()
            ids.append(numbers.setdefault((ids[-1] if ids else -1, block), len(numbers)))
        yield TracedRequest(
            round(request.timestamp - start_ms),
            len(request.prompt),
            request.answer_tokens,
            tuple(ids),
            block_size,
        )
