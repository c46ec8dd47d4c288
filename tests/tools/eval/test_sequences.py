# SPDX-License-Identifier: Apache-2.0
"""Texts and lists of tokens are cut into windows; other files are rejected."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_hybrid_kv.tools.eval.sequences import read_sequences
from vllm_hybrid_kv.tools.output import ToolError


class Characters:
    """A tokenizer that makes each character a token, after an optional `bos_token_id`."""

    def __init__(self, bos_token_id=None):
        self.bos_token_id = bos_token_id

    def encode(self, text, add_special_tokens=True):
        first = add_special_tokens and self.bos_token_id is not None
        return [self.bos_token_id] * first + [ord(character) for character in text]


def written(tmp_path, *entries):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_a_text_is_cut_into_windows(tmp_path):
    (tmp_path / "data.txt").write_text("abcdefg")
    windows = read_sequences(tmp_path / "data.txt", Characters, 3, None)
    assert windows == [[*b"abc"], [*b"def"]]


def test_every_window_starts_with_the_tokenizers_first_token(tmp_path):
    (tmp_path / "data.txt").write_text("abcdefg")
    windows = read_sequences(tmp_path / "data.txt", lambda: Characters(7), 4, None)
    assert windows == [[7, *b"abc"], [7, *b"def"], [7, *b"g"]]


def test_lines_have_text_or_tokens(tmp_path):
    file = written(tmp_path, {"text": "abc"}, {"prompt_token_ids": [5, 6, 7, 8, 9]})
    assert read_sequences(file, Characters, 4, None) == [[*b"abc"], [5, 6, 7, 8]]


def test_the_limit_bounds_windows_and_lines_that_are_read(tmp_path):
    file = written(tmp_path, {"prompt_token_ids": list(range(10))}, {"prompt_token_ids": ["bad"]})
    assert read_sequences(file, pytest.fail, 2, 3) == [[0, 1], [2, 3], [4, 5]]


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(2, 9))
def test_windows_contain_every_token_but_a_single_last_one(tmp_path_factory, tokens, context):
    entries = {"prompt_token_ids": [1, 2]}, {"text": ""}, {"prompt_token_ids": tokens}
    file = written(tmp_path_factory.mktemp("w"), *entries)
    windows = read_sequences(file, Characters, context, None)[1:]
    contained = [token for window in windows for token in window]
    assert contained == tokens[: len(tokens) - (len(tokens) % context == 1)]
    assert all(2 <= len(window) <= context for window in windows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt_token_ids": [1, 2]}\n{', "line 2 is not JSON"),
        (b"[1, 2]", "line 1 has neither 'text'"),
        (b'{"text": 3}', "neither 'text', a string, nor 'prompt_token_ids'"),
        (b'{"prompt_token_ids": [1, -2]}', "a list of numbers from 0"),
        (b'{"prompt_token_ids": [1, true]}', "a list of numbers from 0"),
        (b'{"prompt_token_ids": [1]}\n{"text": ""}', "has nothing to predict"),
        (b"\xff\xfe\xff", "utf-8"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_is_rejected_with_the_line(tmp_path, content, message):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ToolError) as error:
        read_sequences(file, Characters, 4, None)
    assert str(error.value).startswith(f"--data: {file}")
    assert message in str(error.value)
