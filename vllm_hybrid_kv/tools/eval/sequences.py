# SPDX-License-Identifier: Apache-2.0
"""Read the tokens to predict: windows of a text, or of lists of tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllm_hybrid_kv.tools.output import ToolError

SHORTEST = 2
"""Tokens of the shortest window, which has one prediction."""


def read_sequences(
    file: Path, tokenizer: Callable[[], Any], context: int, limit: int | None
) -> list[list[int]]:
    """Cut a file into windows, in order and without overlap.

    If the tokenizer starts texts with a special token, every window of a text starts with it,
    because models predict badly without it.

    The file is plain text, or `.jsonl` whose lines are objects with `text` or `prompt_token_ids`.
    `tokenizer` is called only if there is text. `context` is in tokens, `limit` in windows.

    Raises:
        ToolError: The file cannot be read, has another format, or has nothing to predict.
    """
    load = functools.cache(tokenizer)
    sequences: list[list[int]] = []
    try:
        for part in _parts(file):
            start, tokens = _encode(load(), part) if isinstance(part, str) else ([], part)
            length = context - len(start)
            windows = ([*start, *tokens[i : i + length]] for i in range(0, len(tokens), length))
            sequences += (window for window in windows if len(window) >= SHORTEST)
            if limit is not None and len(sequences) >= limit:
                break
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"--data: {file}: {error}") from None
    if not sequences:
        raise ToolError(f"--data: {file} has nothing to predict: fewer than {SHORTEST} tokens")
    return sequences[:limit]


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return the special token (one or none) that starts every text, and the text's tokens."""
    first = list(tokenizer.encode("")[:1])
    start = first if first == [tokenizer.bos_token_id] else []
    return start, tokenizer.encode(text, add_special_tokens=False)


def _parts(file: Path) -> Iterator[str | list[int]]:
    if file.suffix != ".jsonl":
        yield file.read_text(encoding="utf-8")
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _part(line, f"--data: {file}, line {number}")


def _part(line: str, where: str) -> str | list[int]:
    try:
        match json.loads(line):
            case {"text": str(text)}:
                return text
            case {"prompt_token_ids": list(tokens)} if all(
                type(token) is int and token >= 0 for token in tokens
            ):
                return tokens
    except ValueError as error:
        raise ToolError(f"{where} is not JSON: {error}") from None
    raise ToolError(
        f"{where} has neither 'text', a string, nor 'prompt_token_ids', a list of numbers from 0"
    )
