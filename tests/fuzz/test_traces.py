# SPDX-License-Identifier: Apache-2.0
"""Any file is read as a trace, or causes an error that names the file and the line."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.fuzz.json_values import damaged, encoded, json_values, with_a_change
from vllm_hybrid_kv.tools.replay.trace import (
    BLOCK_TOKENS,
    Conversations,
    TracedRequest,
    TraceError,
    read_trace,
    write_trace,
)

VALUES = json_values(length=5)


@st.composite
def requests(draw: st.DrawFn) -> TracedRequest:
    length = draw(st.integers(1, 3 * BLOCK_TOKENS))
    count = -(-length // BLOCK_TOKENS)
    ids = draw(st.lists(st.integers(-5, 1 << 40), min_size=count, max_size=count))
    timestamp = draw(st.integers(0, 1 << 40) | st.floats(0, 1e12))
    return TracedRequest(timestamp, length, draw(st.integers(1, 50)), tuple(ids))


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """Draw the line of a request, possibly with a changed field or damaged bytes."""
    request = draw(requests())
    fields: dict[str, Any] = {**vars(request), "hash_ids": list(request.hash_ids)}
    kind = draw(st.sampled_from(("a field", "bytes", "nothing")))
    if kind == "a field":
        fields = draw(with_a_change(fields, VALUES, sorted(fields)))
    line = encoded(fields)
    if kind == "bytes":
        line = draw(damaged(line))
    return line.replace(b"\n", b" ").replace(b"\r", b" ")


def read(content: bytes) -> tuple[list[TracedRequest], str]:
    """Write a file and read it as a trace; return the requests, and the error message or ""."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        path.write_bytes(content)
        try:
            return read_trace(path), ""
        except TraceError as error:
            return [], str(error).replace(str(path), "FILE")


@settings(max_examples=400, deadline=None)
@example([b'{"input_length": 1, "output_length": 1, "hash_ids": [0]}', b"\xff"])
@example([b"[" * 100_000])
@example([b'{"input_length": ' + b"1" * 5000 + b"}"])
@given(st.lists(lines() | st.binary(max_size=30), max_size=4))
def test_any_lines_are_read_or_refused_with_file_and_line(content):
    requests_read, message = read(b"\n".join(content))
    assert requests_read or message.startswith(("FILE, line ", "FILE has no requests"))
    for request in requests_read:
        assert request.input_length > 0 < request.output_length
        assert isinstance(request.timestamp, int) or math.isfinite(request.timestamp)
        assert len(request.hash_ids) == -(-request.input_length // BLOCK_TOKENS)
        assert not any(isinstance(block, bool) for block in request.hash_ids)


@settings(max_examples=100, deadline=None)
@given(st.lists(requests(), min_size=1, max_size=6))
def test_a_written_trace_is_read_back_with_the_right_numbers_of_tokens(trace):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.jsonl"
        write_trace(path, trace)
        assert read_trace(path) == trace
    conversations = Conversations(trace)
    for index, request in enumerate(trace):
        prompt, answer = conversations.tokens(index)
        assert (len(prompt), len(answer)) == (request.input_length, request.output_length)
