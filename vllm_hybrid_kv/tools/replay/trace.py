# SPDX-License-Identifier: Apache-2.0
"""Traces of requests in Mooncake's format, and the tokens that they stand for.

A line of a trace is one request:

    {"timestamp": 27000, "input_length": 1300, "output_length": 52, "hash_ids": [46, 47, 2353]}

`timestamp` is in milliseconds, the lengths are in tokens, and there is one hash id for every 512
tokens of the prompt, the last of which may be partial. Ids are chained: equal ids mean an equal
prefix up to and including that block.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from vllm_hybrid_kv.tools.output import ToolError

BLOCK_TOKENS = 512
"""The tokens that one hash id stands for."""


class TraceError(ToolError):
    """A trace is not in the format; names the file, the line and the field."""


@dataclass(frozen=True)
class TracedRequest:
    """One request of a trace.

    Attributes:
        timestamp: When it arrived, in milliseconds.
        input_length: Tokens of the prompt.
        output_length: Tokens of the answer, at least 1.
        hash_ids: One id for each 512 tokens of the prompt, the last block perhaps partial.
    """

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]

    @property
    def full_ids(self) -> tuple[int, ...]:
        """The ids of the blocks that the prompt fills."""
        return self.hash_ids[: self.input_length // BLOCK_TOKENS]


def read_trace(path: Path, limit: int | None = None) -> list[TracedRequest]:
    """Read a trace.

    Args:
        path: A file of JSON lines; empty lines are skipped.
        limit: The number of requests to read; None for all.

    Raises:
        TraceError: The file cannot be read, a line is not in the format, or there is no request.
    """
    requests: list[TracedRequest] = []
    try:
        # As bytes, for what is no text belongs to a line too.
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if limit is not None and len(requests) >= limit:
                    break
                if line.strip():
                    requests.append(_parse(line, f"{path}, line {number}"))
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from error
    if not requests:
        raise TraceError(f"{path} has no requests")
    return requests


def _parse(line: bytes, where: str) -> TracedRequest:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        # What is no text, and numbers of thousands of digits, are errors of their own.
        raise TraceError(f"{where} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise TraceError(f"{where} is not an object")
    for name in ("input_length", "output_length"):
        value = fields.get(name)
        if not _is_number(value) or value < 1:
            raise TraceError(f"{where}: {name} must be a positive number, got {value!r}")
    timestamp = fields.get("timestamp", 0)
    if not _is_number(timestamp) and not (
        isinstance(timestamp, float) and math.isfinite(timestamp)
    ):
        raise TraceError(f"{where}: timestamp must be in milliseconds, got {timestamp!r}")
    ids = fields.get("hash_ids")
    if not isinstance(ids, list) or not all(map(_is_number, ids)):
        raise TraceError(f"{where}: hash_ids must be a list of numbers")
    wanted = -(-fields["input_length"] // BLOCK_TOKENS)
    if len(ids) != wanted:
        raise TraceError(
            f"{where}: {fields['input_length']} tokens are {wanted} blocks of {BLOCK_TOKENS}, "
            f"but hash_ids has {len(ids)}"
        )
    return TracedRequest(timestamp, fields["input_length"], fields["output_length"], tuple(ids))


def _is_number(value: object) -> TypeGuard[int]:
    # JSON's true and false are Python's 1 and 0.
    return isinstance(value, int) and not isinstance(value, bool)


def write_trace(path: Path, requests: Iterable[TracedRequest]) -> None:
    """Write a trace."""
    with path.open("w") as lines:
        for request in requests:
            fields = {
                "timestamp": request.timestamp,
                "input_length": request.input_length,
                "output_length": request.output_length,
                "hash_ids": list(request.hash_ids),
            }
            lines.write(json.dumps(fields) + "\n")


def shareable_tokens(requests: Sequence[TracedRequest]) -> int:
    """Count the prompt tokens in full blocks that an earlier request had: no cache can hit more.

    The tail that a prompt shares with what follows it in a later one is not counted.
    """
    seen: set[int] = set()
    shared = 0
    for request in requests:
        for block in request.full_ids:
            if block not in seen:
                break
            shared += BLOCK_TOKENS
        seen.update(request.full_ids)
    return shared


class Conversations:
    """The token ids of a trace's prompts and answers.

    A block's tokens follow from its hash id. A prompt's last, partial block has an id of its own
    in such traces, though in a conversation the next turn's prompt starts with this prompt and
    its answer. So where a later request has every full block of this one, the partial block's
    tokens are taken to be what that request has there, and the answer to be what follows there.
    Tokens that nothing says anything about are the request's own.
    """

    def __init__(self, requests: Sequence[TracedRequest]) -> None:
        """Find each request's continuation, the first later one with all its full blocks.

        Args:
            requests: The trace, in the order of arrival.
        """
        self._requests = requests
        # Ids are chained: who has a request's last full block has them all.
        first_after: dict[int, int] = {}
        self._continuation: list[int | None] = [None] * len(requests)
        for index in range(len(requests) - 1, -1, -1):
            full = requests[index].full_ids
            if full:
                self._continuation[index] = first_after.get(full[-1])
            for block in full:
                first_after[block] = index

    def tokens(self, index: int) -> tuple[list[int], list[int]]:
        """Return the token ids of a request's prompt and answer.

        Args:
            index: The request's place in the trace.
        """
        request = self._requests[index]
        wanted = request.input_length + request.output_length
        tokens: list[int] = []
        owner: int | None = index
        # The full blocks of one request, then those that its continuation has after them, and so
        # on; each step goes to a later request.
        while owner is not None and len(tokens) < wanted:
            blocks = self._requests[owner].full_ids[len(tokens) // BLOCK_TOKENS :]
            for block in blocks[: -(-(wanted - len(tokens)) // BLOCK_TOKENS)]:
                tokens.extend(_block_tokens(block))
            last, owner = owner, self._continuation[owner]
        del tokens[wanted:]
        tokens.extend(_own_tokens(last, len(tokens), wanted))
        return tokens[: request.input_length], tokens[request.input_length :]


def _block_tokens(block: int) -> range:
    # Ids need only differ; vLLM's scheduler never looks a token up.
    return range(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)


def _own_tokens(index: int, start: int, stop: int) -> range:
    # Below zero, where no block's tokens are; no two requests' overlap.
    base = -1 - index << 24
    return range(base + start, base + stop)
