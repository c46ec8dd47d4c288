# SPDX-License-Identifier: Apache-2.0
"""Read traces of requests in Mooncake's format, and make up token ids for them.

A line of a trace is one request:

    {"timestamp": 27000, "input_length": 1300, "output_length": 52, "hash_ids": [46, 47, 2353]}

`timestamp` is in milliseconds and the lengths are in tokens. Every 512 tokens of the prompt have a
hash id; the last block can be partial. Equal ids mean an equal prefix up to the end of that block.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from reprlib import repr as short
from typing import Annotated

from pydantic import Field, FiniteFloat, PositiveInt, TypeAdapter, ValidationError

from vllm_hybrid_kv.tools.output import ToolError

BLOCK_TOKENS = 512
"""Each hash id stands for this many tokens."""


class TraceError(ToolError):
    """A trace is not in Mooncake's format; the message has the file, the line and the field."""


@dataclass(frozen=True)
class TracedRequest:
    """One request of a trace.

    Attributes:
        timestamp: The arrival in milliseconds.
        input_length: Tokens of the prompt.
        output_length: Tokens of the answer.
        hash_ids: One id for each 512 tokens of the prompt; the last block can be partial.
    """

    timestamp: Annotated[FiniteFloat, Field(default=0)]
    input_length: PositiveInt
    output_length: PositiveInt
    hash_ids: tuple[int, ...]

    @property
    def full_ids(self) -> tuple[int, ...]:
        """The ids of the full blocks."""
        return self.hash_ids[: self.input_length // BLOCK_TOKENS]


_REQUEST = TypeAdapter(TracedRequest)


def read_trace(path: Path, limit: int | None = None) -> list[TracedRequest]:
    """Read the first `limit` requests of a trace, a file of JSON lines. Empty lines are skipped.

    Raises:
        TraceError: The file cannot be read, a line is not in the format, or there is no request.
    """
    try:
        # Read bytes, so that the error for invalid UTF-8 names its line.
        with path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            requests = [
                _parse(line, f"{path}, line {number}") for number, line in islice(lines, limit)
            ]
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from error
    if not requests:
        raise TraceError(f"{path} has no requests")
    return requests


def _parse(line: bytes, place: str) -> TracedRequest:
    try:
        request = _REQUEST.validate_json(line, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        field = "".join(f"{part}: " for part in fault["loc"])
        raise TraceError(f"{place}: {field}{fault['msg']}, got {short(fault['input'])}") from None
    blocks = -(-request.input_length // BLOCK_TOKENS)
    if len(request.hash_ids) != blocks:
        raise TraceError(
            f"{place}: {request.input_length} tokens are {blocks} blocks of {BLOCK_TOKENS}, "
            f"but hash_ids has {len(request.hash_ids)}"
        )
    return request


def write_trace(path: Path, requests: Iterable[TracedRequest]) -> None:
    path.write_text("".join(json.dumps(asdict(request)) + "\n" for request in requests))


def shareable_tokens(requests: Sequence[TracedRequest]) -> int:
    """Count the prompt tokens that earlier requests contain: the most that a cache can hit.

    Only full blocks count, although a later request may continue a partial block.
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

    The hash id of a full block determines its tokens. A trace does not say how the
    partial block at the end of a prompt continues in the next turn of the conversation. So a later
    request that starts with all full blocks of an earlier request counts as its next turn: the
    earlier request's partial block and answer get the tokens of the later request. All
    other tokens are unique to a request.

    Args:
        requests: The trace, in the order of arrival.
    """

    def __init__(self, requests: Sequence[TracedRequest]) -> None:
        self._requests = requests
        # A request's continuation is the first later request with the same last full block. Ids
        # are chained, so the continuation has all full blocks of the request.
        first_after: dict[int, int] = {}
        self._continuation: list[int | None] = [None] * len(requests)
        for index in range(len(requests) - 1, -1, -1):
            full = requests[index].full_ids
            if full:
                self._continuation[index] = first_after.get(full[-1])
            for block in full:
                first_after[block] = index

    def tokens(self, index: int) -> tuple[list[int], list[int]]:
        """Return the token ids of the prompt and the answer of a request of the trace."""
        request = self._requests[index]
        length = request.input_length + request.output_length
        tokens: list[int] = []
        owner: int | None = index
        # Take the full blocks of the request, then the further full blocks of its continuation,
        # then those of the continuation's own continuation, and so on.
        while owner is not None and len(tokens) < length:
            blocks = self._requests[owner].full_ids[len(tokens) // BLOCK_TOKENS :]
            for block in blocks[: -(-(length - len(tokens)) // BLOCK_TOKENS)]:
                tokens.extend(_block_tokens(block))
            last, owner = owner, self._continuation[owner]
        del tokens[length:]
        tokens.extend(_own_tokens(last, len(tokens), length))
        return tokens[: request.input_length], tokens[request.input_length :]


def _block_tokens(block: int) -> range:
    # Token ids only need to differ: vLLM's scheduler never looks them up.
    return range(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)


def _own_tokens(index: int, start: int, stop: int) -> range:
    # Use negative ids, because blocks use the others. The ids of two requests do not overlap.
    base = -1 - index << 24
    return range(base + start, base + stop)
