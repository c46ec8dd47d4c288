# SPDX-License-Identifier: Apache-2.0
"""Prompts for the recall models, and counts of their right answers by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from testing.recall_sequences import ANSWER, COPY, Sequence, copy_sequence, recall_sequence

DISTANCES = (128, 512, 1024, 2048)
"""Upper ends of the bands of distance between a question and its answer's source, in tokens."""
DEPTHS = 4
"""Number of parts of the tokens before the first question."""

Place = tuple[int, int]
"""A band of distance, and the part that contains the source."""


@dataclass
class Tally:
    """Answers by place.

    Attributes:
        asked: Number of questions.
        right: Number of questions whose right answer was the most probable token.
        surprise: Sum of the right answers' negative log-probabilities.
    """

    asked: Counter[Place] = field(default_factory=Counter)
    right: Counter[Place] = field(default_factory=Counter)
    surprise: float = 0.0

    @property
    def share(self) -> float:
        """Share of right answers over all places."""
        return self.right.total() / self.asked.total()

    @property
    def loss(self) -> float:
        """Mean negative log-probability of the right answers."""
        return self.surprise / self.asked.total()

    def shares(self) -> dict[Place, float]:
        """Return the share of right answers by place."""
        return {place: self.right[place] / asked for place, asked in sorted(self.asked.items())}

    def count(self, place: Place, right: bool, logprob: float = 0.0) -> None:
        """Count one question."""
        self.asked[place] += 1
        self.right[place] += right
        self.surprise -= logprob

    def table(self) -> str:
        """Return the counts as text, with a line for each band of distance."""
        lines = []
        for band in DISTANCES:
            counts = ((self.right[band, part], self.asked[band, part]) for part in range(DEPTHS))
            cells = " ".join(f"{right:5d}/{asked:<5d}" for right, asked in counts)
            lines.append(f"up to {band:4d} back: {cells}")
        return "\n".join([*lines, f"all: {self.share:.2%}, loss {self.loss:.4f}"])


def place(index: int, source: int, first: int) -> Place:
    """Return the place of the question at `index`; the first question is at `first`."""
    distance = next(band for band in DISTANCES if index - source <= band)
    return distance, int(source) * DEPTHS // int(first)


def sheets(seed: int, lengths: Iterable[int]) -> list[Sequence]:
    """Return sequences of pairs without text, with a question for every second pair."""
    draw = np.random.default_rng(seed)
    return [recall_sequence(draw, length, 0.0, length // 5) for length in lengths]


def count_answers(
    sequences: list[Sequence], ranks: list[list[int]], logprobs: list[list[float]]
) -> Tally:
    """Count the answers that were the most probable token.

    Args:
        sequences: The prompts.
        ranks: Ranks of each prompt's tokens from the second on; 1 is the most probable.
        logprobs: Log-probabilities of the same tokens.
    """
    tally = Tally()
    for sequence, rank, logprob in zip(sequences, ranks, logprobs, strict=True):
        answers = np.flatnonzero(sequence.kinds == ANSWER)
        for index in answers:
            where = place(index, sequence.sources[index], answers[0])
            tally.count(where, rank[index - 1] == 1, logprob[index - 1])
    return tally


def questions_one_by_one(
    sequence: Sequence, count: int
) -> tuple[list[list[int]], list[int], list[Place]]:
    """Return prompts with a sequence up to its first question and one question, answers, places."""
    answers = np.flatnonzero(sequence.kinds == ANSWER)
    start = sequence.tokens[: answers[0] - 1].tolist()
    prompts, wanted, places = [], [], []
    for index in answers[:: max(1, len(answers) // count)][:count]:
        prompts.append([*start, int(sequence.tokens[index - 1])])
        wanted.append(int(sequence.tokens[index]))
        places.append(place(len(start) + 1, sequence.sources[index], answers[0]))
    return prompts, wanted, places


def copies(seed: int, lengths: Iterable[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts up to the copy mark and one more symbol, and the tokens that must follow."""
    draw = np.random.default_rng(seed)
    drawn = [copy_sequence(draw, length, 0.0).tokens.tolist() for length in lengths]
    cuts = [tokens.index(COPY) + 2 for tokens in drawn]
    pairs = list(zip(drawn, cuts, strict=True))
    return [tokens[:cut] for tokens, cut in pairs], [tokens[cut:] for tokens, cut in pairs]
