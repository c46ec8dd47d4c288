# SPDX-License-Identifier: Apache-2.0
"""Make the sequences that the recall models are trained and tested on: recall, copying, text.

The vocabulary has a few marks, the 256 bytes for text, and symbols without a meaning. The first
half of the symbols are keys, the second half are values.

* recall: pairs of a key and its value between pieces of text, then keys again, each followed by
  its value. Values are drawn for each sequence, so only the cache has the answer.
* copy: distinct symbols, text, the copy mark, then a run of the same symbols again.
* text: bytes of Python's own documentation, `pydoc_data.topics`.
"""

from __future__ import annotations

import functools
import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BOS, EOS, PAD, COPY = range(4)
FIRST_BYTE = 8
"""The id of byte 0. The ids from 4 to 7 are reserved."""
FIRST_SYMBOL = FIRST_BYTE + 256
VOCAB_SIZE = 2048
FIRST_VALUE = (FIRST_SYMBOL + VOCAB_SIZE) // 2
KEYS = FIRST_VALUE - FIRST_SYMBOL
SYMBOLS = VOCAB_SIZE - FIRST_SYMBOL

NO_LABEL, ANSWER, TEXT = 0, 1, 2
"""Kinds of tokens: NO_LABEL cannot be predicted, ANSWER can be recalled, TEXT can be guessed."""


@dataclass(frozen=True)
class Sequence:
    """Token ids, their kinds, and for each `ANSWER` the index of the token that it repeats."""

    tokens: np.ndarray
    kinds: np.ndarray
    sources: np.ndarray


@functools.cache
def corpus() -> np.ndarray:
    """Return the token ids of the training text, which is all but the last tenth of the text."""
    return _text()[: -len(_text()) // 10]


def documentation() -> str:
    """Return the text of Python's language reference, which comes with Python (PSF licence)."""
    return "\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


@functools.cache
def _text() -> np.ndarray:
    return np.frombuffer(documentation().encode(), dtype=np.uint8).astype(np.int64) + FIRST_BYTE


def _piece(draw: np.random.Generator, length: int) -> np.ndarray:
    start = draw.integers(0, len(corpus()) - length)
    return corpus()[start : start + length]


class _Writer:
    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.length = 0
        self.write([BOS])

    def write(self, tokens: np.ndarray | list[int], kind: int = NO_LABEL, source: int = -1) -> int:
        """Append tokens; return their index. `source` is the index of the tokens they repeat."""
        at, count = self.length, len(tokens)
        sources = source + np.arange(count) if source >= 0 else np.full(count, -1)
        self.parts.append((np.asarray(tokens), np.full(count, kind), sources))
        self.length += count
        return at

    def done(self) -> Sequence:
        return Sequence(*(np.concatenate(part) for part in zip(*self.parts, strict=True)))


def text_sequence(draw: np.random.Generator, length: int) -> Sequence:
    writer = _Writer()
    writer.write(_piece(draw, length - 1), TEXT)
    return writer.done()


def copy_sequence(
    draw: np.random.Generator, length: int, text_share: float | None = None
) -> Sequence:
    """Return symbols, text, then some of the symbols again. `text_share` is random if None."""
    if text_share is None:
        text_share = draw.choice([0.0, 0.0, 0.3, 0.8])
    text = int((length - 4) * text_share)
    count = (length - 2 - text) // 2
    # A copy may start at a later symbol. That symbol is given, and the answer follows it.
    start = 0 if draw.random() < 0.5 else int(draw.integers(0, max(1, count // 2)))
    count = min(SYMBOLS, length - 2 - text - count + start)
    symbols = FIRST_SYMBOL + draw.permutation(SYMBOLS)[:count]
    writer = _Writer()
    at = writer.write(symbols)
    copied = min(count - start, length - 2 - count - text)
    writer.write(_piece(draw, length - 2 - count - copied), TEXT)
    writer.write([COPY])
    again = symbols[start : start + copied]
    if start:
        writer.write(again[:1])
        again, start = again[1:], start + 1
    writer.write(again, ANSWER, at + start)
    return writer.done()


def recall_sequence(
    draw: np.random.Generator,
    length: int,
    text_share: float | None = None,
    questions: int | None = None,
) -> Sequence:
    """Return pairs between pieces of text, then some keys again, each followed by its value.

    `text_share` is the share of text before the questions. A parameter that is None is random.
    """
    if text_share is None:
        text_share = draw.choice([0.0, 0.3, 0.6, 0.9])
    if questions is None:
        share = (1 - text_share) / (2 - text_share)
        questions = max(1, int(length // 2 * share * draw.uniform(0.4, 1)))
    room = length - 1 - 2 * questions
    pairs = min(KEYS, max(questions, int(room * (1 - text_share)) // 2))
    keys = FIRST_SYMBOL + draw.permutation(KEYS)[:pairs]
    values = draw.integers(FIRST_VALUE, VOCAB_SIZE, pairs)
    text = room - 2 * pairs
    writer = _Writer()
    cuts = np.sort(draw.integers(0, text + 1, pairs))
    places, before = [], 0
    for key, value, cut in zip(keys, values, cuts, strict=True):
        if cut > before:
            writer.write(_piece(draw, cut - before), TEXT)
            before = cut
        places.append(writer.write([key, value]) + 1)
    if text > before:
        writer.write(_piece(draw, text - before), TEXT)
    for pair in draw.permutation(pairs)[:questions]:
        writer.write([keys[pair]])
        writer.write([values[pair]], ANSWER, places[pair])
    return writer.done()


KINDS: dict[str, Callable[[np.random.Generator, int], Sequence]] = {
    "recall": recall_sequence,
    "copy": copy_sequence,
    "text": text_sequence,
}
