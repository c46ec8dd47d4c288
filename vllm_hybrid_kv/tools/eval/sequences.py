# SPDX-License-Identifier: Apache-2.0
"""The tokens to predict: windows of a text, or of what a file has for each request."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_hybrid_kv.tools.eval.errors import EvaluationError

SHORTEST = 2
"""Tokens of a window in which there is something to predict."""


def read_sequences(
    file: Path, tokenizer: Callable[[], Any], context: int, limit: int | None
) -> list[list[int]]:
    """Return the windows of a file, in its order.

    Windows do not overlap. Where the tokenizer begins texts with a token of its own, every window
    of a text begins with it, for models that never saw one without predict nonsense.

    Args:
        file: Plain text; or, named `.jsonl`, an object a line with `text` or `prompt_token_ids`.
        tokenizer: Returns the model's, from transformers; called where there is text.
        context: The most tokens of a window.
        limit: The most windows.

    Raises:
        EvaluationError: It cannot be read, is no such file, or has nothing to predict.
    """
    loaded: list[Any] = []

    def windows_of_text(text: str) -> Iterator[list[int]]:
        if not loaded:
            loaded.append(tokenizer())
        begin = _begin(loaded[0])
        tokens = loaded[0].encode(text, add_special_tokens=False)
        for window in _cut(tokens, context - len(begin)):
            yield [*begin, *window]

    sequences: list[list[int]] = []
    try:
        for part in _parts(file):
            windows = windows_of_text(part) if isinstance(part, str) else _cut(part, context)
            sequences += (window for window in windows if len(window) >= SHORTEST)
            if limit is not None and len(sequences) >= limit:
                break
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"--data: {file}: {error}") from None
    if not sequences:
        raise EvaluationError(f"--data: {file} has nothing to predict: no {SHORTEST} tokens")
    return sequences[:limit]


def _parts(file: Path) -> Iterator[str | list[int]]:
    """Give a file's texts and lists of tokens, one after another."""
    if file.suffix != ".jsonl":
        yield file.read_text(encoding="utf-8")
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _part(line, f"--data: {file}, line {number}")


def _part(line: str, where: str) -> str | list[int]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise EvaluationError(f"{where} is not JSON: {error}") from None
    if isinstance(entry, dict):
        text, tokens = entry.get("text"), entry.get("prompt_token_ids")
        if isinstance(text, str):
            return text
        if isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens):
            return tokens
    raise EvaluationError(
        f"{where} has neither 'text', a string, nor 'prompt_token_ids', a list of numbers from 0"
    )


def _begin(tokenizer: Any) -> list[int]:
    """Return the token that begins every text, if there is one."""
    begin = tokenizer.encode("")[:1]
    return list(begin) if begin and begin[0] == tokenizer.bos_token_id else []


def _cut(tokens: list[int], length: int) -> Iterator[list[int]]:
    return (tokens[at : at + length] for at in range(0, len(tokens), length))
