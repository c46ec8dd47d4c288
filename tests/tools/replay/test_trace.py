# SPDX-License-Identifier: Apache-2.0
"""Traces are read in Mooncake's format, and only equal hash ids become equal token ids."""

import json

import pytest

from vllm_hybrid_kv.tools.replay.trace import (
    Conversations,
    TracedRequest,
    TraceError,
    read_trace,
    shareable_tokens,
    write_trace,
)


def request(length, answer, *ids):
    return TracedRequest(0, length, answer, ids)


def test_a_limited_number_of_requests_is_read(tmp_path):
    requests = [request(1024, 5, 1, 2), request(700, 1, 1, 3)]
    write_trace(tmp_path / "trace", requests)
    assert read_trace(tmp_path / "trace", limit=1) == requests[:1]


REQUEST = {"timestamp": 0, "input_length": 700, "output_length": 1, "hash_ids": [1, 3]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**REQUEST, "input_length": 0}, "input_length: Input should be greater than 0, got 0"),
        ({**REQUEST, "output_length": None}, "output_length: .* valid integer, got None"),
        ({**REQUEST, "output_length": True}, "output_length: .* valid integer, got True"),
        ({**REQUEST, "hash_ids": [1]}, "700 tokens are 2 blocks of 512, but hash_ids has 1; if"),
        ({**REQUEST, "hash_ids": [1], "block_size": 700}, "block_size is 700, but 512 in the"),
        ({**REQUEST, "block_size": 0}, "block_size: Input should be greater than 0, got 0"),
        ({**REQUEST, "hash_ids": [1, "a"]}, "hash_ids: 1: .* valid integer, got 'a'"),
        ({**REQUEST, "timestamp": "now"}, "timestamp: .* valid number, got 'now'"),
        ([], "Input should be an object"),
    ],
)
def test_an_error_names_the_line_and_the_field(tmp_path, line, message):
    path = tmp_path / "trace"
    path.write_text(json.dumps(REQUEST) + "\n\n" + json.dumps(line) + "\n")
    with pytest.raises(TraceError, match=f"{path}, line 3: {message}"):
        read_trace(path)


@pytest.mark.parametrize(
    ("text", "message"), [("\n", "has no requests"), ("{", "line 1: Invalid JSON")]
)
def test_a_file_without_requests_is_refused(tmp_path, text, message):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_a_line_without_a_block_size_has_the_one_that_the_user_passes(tmp_path):
    requests = [TracedRequest(0, 20, 1, (1, 2), block_size=16)]
    path = tmp_path / "trace"
    write_trace(path, requests)
    assert read_trace(path) == requests
    path.write_text('{"timestamp": 0, "input_length": 20, "output_length": 1, "hash_ids": [1, 2]}')
    assert read_trace(path, block_size=16) == requests


def test_the_timestamp_can_be_omitted(tmp_path):
    path = tmp_path / "trace"
    path.write_text('{"input_length": 3, "output_length": 1, "hash_ids": [1]}')
    assert read_trace(path) == [request(3, 1, 1)]


def test_only_equal_hash_ids_have_equal_tokens():
    talks = Conversations([request(1024, 1, 1, 2), request(1536, 1, 1, 2, 4), request(512, 1, 9)])
    first, second, third = (talks.tokens(i)[0] for i in range(3))
    assert second[:1024] == first
    assert len(set(second)) == 1536
    assert not set(third) & set(second)


def test_the_next_turn_starts_with_the_prompt_and_the_answer():
    talks = Conversations([request(700, 300, 1, 2), request(1536, 4, 1, 3, 4)])
    prompt, answer = talks.tokens(0)
    assert (len(prompt), len(answer)) == (700, 300)
    assert prompt + answer == talks.tokens(1)[0][:1000]


def test_an_answer_longer_than_the_next_turn_ends_with_tokens_of_its_own():
    talks = Conversations([request(700, 900, 1, 2), request(1024, 4, 1, 3)])
    prompt, answer = talks.tokens(0)
    whole = talks.tokens(1)[0]
    assert prompt + answer[: 1024 - 700] == whole
    assert not set(answer[1024 - 700 :]) & set(whole)


def test_a_partial_block_comes_from_the_next_request_with_the_same_full_blocks():
    lengths = enumerate((600, 650, 1024, 520), 2)
    talks = Conversations([request(length, 1, 1, own) for own, length in lengths])
    first, second, third, fourth = (talks.tokens(i)[0] for i in range(4))
    assert first == third[:600]
    assert second == third[:650]
    assert fourth[:512] == third[:512]
    assert not set(fourth[512:]) & set(third)


def test_shareable_tokens_are_those_in_full_blocks_of_earlier_requests():
    requests = [request(1024, 1, 1, 2), request(1100, 1, 1, 2, 3), request(512, 1, 1)]
    assert shareable_tokens(requests) == 1024 + 512
