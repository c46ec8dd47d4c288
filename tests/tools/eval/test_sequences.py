# SPDX-License-Identifier: Apache-2.0
"""Texts and lists of tokens become windows, and a file that has none is refused in words."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_hybrid_kv.tools.eval.errors import EvaluationError
from vllm_hybrid_kv.tools.eval.sequences import read_sequences


class Characters:
    """A tokenizer with a token for each character, which may begin texts with one of its own."""

    def __init__(self, bos_token_id=None):
        self.bos_token_id = bos_token_id

    def encode(self, text, add_special_tokens=True):
        begin = add_special_tokens and self.bos_token_id is not None
        return [self.bos_token_id] * begin + [ord(character) for character in text]


def no_tokenizer():
    raise AssertionError("there is no text")


def written(tmp_path, *entries):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_a_text_is_cut_into_windows(tmp_path):
    (tmp_path / "data.txt").write_text("abcdefg")
    windows = read_sequences(tmp_path / "data.txt", Characters, 3, None)
    assert ["".join(map(chr, window)) for window in windows] == ["abc", "def"]


def test_every_window_begins_as_texts_do(tmp_path):
    (tmp_path / "data.txt").write_text("abcdefg")
    windows = read_sequences(tmp_path / "data.txt", lambda: Characters(7), 4, None)
    assert windows == [[7, *b"abc"], [7, *b"def"], [7, *b"g"]]


def test_lines_have_texts_or_tokens(tmp_path):
    file = written(tmp_path, {"text": "abc"}, {"prompt_token_ids": [5, 6, 7, 8, 9]})
    assert read_sequences(file, Characters, 4, None) == [[*b"abc"], [5, 6, 7, 8]]


def test_without_text_no_tokenizer_is_loaded(tmp_path):
    file = written(tmp_path, {"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3, 4]})
    assert read_sequences(file, no_tokenizer, 9, None) == [[1, 2], [3, 4]]


def test_no_more_windows_than_asked_for(tmp_path):
    file = written(tmp_path, {"prompt_token_ids": list(range(10))}, {"prompt_token_ids": ["bad"]})
    assert read_sequences(file, no_tokenizer, 2, 3) == [[0, 1], [2, 3], [4, 5]]


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(2, 9))
def test_windows_hold_every_token_but_a_last_one_alone(tmp_path_factory, tokens, context):
    file = written(tmp_path_factory.mktemp("w"), {"prompt_token_ids": [1, 2]}, {"text": ""})
    with file.open("a") as lines:
        lines.write(json.dumps({"prompt_token_ids": tokens}))
    windows = read_sequences(file, Characters, context, None)[1:]
    held = [token for window in windows for token in window]
    assert held == tokens[: len(tokens) - (len(tokens) % context == 1)]
    assert all(2 <= len(window) <= context for window in windows)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1, 2]", "line 2 has neither 'text'"),
        ('{"text": 3}', "neither 'text', a string, nor 'prompt_token_ids'"),
        ('{"prompt_token_ids": [1, -2]}', "a list of numbers from 0"),
        ('{"prompt_token_ids": [1, true]}', "a list of numbers from 0"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"prompt_token_ids": [1, 2]}}\n{line}\n')
    with pytest.raises(EvaluationError) as error:
        read_sequences(file, Characters, 4, None)
    assert message in str(error.value)


def test_a_file_without_anything_to_predict_is_refused(tmp_path):
    file = written(tmp_path, {"prompt_token_ids": [1]}, {"text": ""})
    with pytest.raises(EvaluationError, match="has nothing to predict"):
        read_sequences(file, Characters, 4, None)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match="No such file"):
        read_sequences(tmp_path / "missing.txt", Characters, 4, None)
    (tmp_path / "data.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(EvaluationError, match=r"--data: .*utf-8"):
        read_sequences(tmp_path / "data.txt", Characters, 4, None)
