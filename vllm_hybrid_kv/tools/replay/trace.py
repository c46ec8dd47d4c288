# SPDX-License-Identifier: Apache-2.0
"""Read traces of requests in Mooncake's format, and make up token ids for them.

A line of a trace is one request:

    {"timestamp": 27000, "input_length": 1300, "output_length": 52, "hash_ids": [46, 47, 2353]}

`timestamp` is in milliseconds and the lengths are in tokens. Every 512 tokens of the prompt have a
hash id; the last block can be partial. Equal ids mean an equal prefix up to the end of that block.

A line may have a field that Mooncake's format lacks, `block_size`: the tokens of a hash id. All
lines of a trace have the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from reprlib import repr as short
from typing import Annotated

from pydantic import Field, FiniteFloat, PositiveInt, TypeAdapter, ValidationError

from vllm_hybrid_kv.tools.output import ToolError

BLOCK_TOKENS = 512
"""Each hash id of Mooncake's traces stands for this many tokens."""


class TraceError(ToolError):
    """A trace is not in Mooncake's format; the message has the file, the line and the field."""


@dataclass(frozen=True)
class TracedRequest:
    """One request of a trace.

    Attributes:
        timestamp: The arrival in milliseconds.
        input_length: Tokens of the prompt.
        output_length: Tokens of the answer.
        hash_ids: One id for each block of the prompt; the last block can be partial.
        block_size: Tokens of a block.
    """

    timestamp: Annotated[FiniteFloat, Field(default=0)]
    input_length: PositiveInt
    output_length: PositiveInt
    hash_ids: tuple[int, ...]
    block_size: PositiveInt = BLOCK_TOKENS

    @property
    def full_ids(self) -> tuple[int, ...]:
        """The ids of the full blocks."""
        return self.hash_ids[: self.input_length // self.block_size]


_REQUEST = TypeAdapter(TracedRequest)


def read_trace(
    path: Path, limit: int | None = None, block_size: int = BLOCK_TOKENS
) -> list[TracedRequest]:
    """Read the first `limit` requests of a trace, a file of JSON lines. Empty lines are skipped.

    Hash ids of lines without a `block_size` stand for `block_size` tokens.

    Raises:
        TraceError: The file cannot be read, a line is not in the format, or there is no request.
    """
    try:
        # Read bytes, so that the error for invalid UTF-8 names its line.
        with path.open("rb") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            requests: list[TracedRequest] = []
            for number, line in islice(lines, limit):
                place = f"{path}, line {number}"
                requests.append(_parse(line, place, block_size))
                first, last = requests[0].block_size, requests[-1].block_size
                if last != first:
                    raise TraceError(
                        f"{place}: block_size is {last}, but {first} in the lines before; hash ids "
                        "of different blocks cannot be compared, so write two traces"
                    )
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from error
    if not requests:
        raise TraceError(f"{path} has no requests")
    return requests


def _parse(line: bytes, place: str, block_size: int) -> TracedRequest:
    try:
        request = _REQUEST.validate_json(line, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        field = "".join(f"{part}: " for part in fault["loc"])
        raise TraceError(f"{place}: {field}{fault['msg']}, got {short(fault['input'])}") from None
    if b'"block_size"' not in line:
        request = replace(request, block_size=block_size)
    blocks = -(-request.input_length // request.block_size)
    if len(request.hash_ids) != blocks:
        raise TraceError(
            f"{place}: {request.input_length} tokens are {blocks} blocks of {request.block_size}, "
            f"but hash_ids has {len(request.hash_ids)}; if an id stands for another number of "
            "tokens, pass it as --trace-block-size"
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
            shared += request.block_size
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
        size = request.block_size
        tokens: list[int] = []
        owner: int | None = index
        # Take the full blocks of the request, then the further full blocks of its continuation,
        # then those of the continuation's own continuation, and so on.
        while owner is not None and len(tokens) < length:
            blocks = self._requests[owner].full_ids[len(tokens) // size :]
            for block in blocks[: -(-(length - len(tokens)) // size)]:
                # Token ids only need to differ: vLLM's scheduler never looks them up.
                tokens.extend(range(block * size, (block + 1) * size))
            last, owner = owner, self._continuation[owner]
        del tokens[length:]
        tokens.extend(_own_tokens(last, len(tokens), length))
        return tokens[: request.input_length], tokens[request.input_length :]


def _own_tokens(index: int, start: int, stop: int) -> range:
    # Use negative ids, because blocks use the others. The ids of two requests do not overlap.
    base = -1 - index << 24
    return range(base + start, base + stop)
