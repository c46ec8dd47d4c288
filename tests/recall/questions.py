# SPDX-License-Identifier: Apache-2.0
"""What the recall models are asked on an engine, and how their answers are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from tests.recall.sequences import ANSWER, COPY, Sequence, copy_sequence, recall_sequence

DISTANCES = (128, 512, 1024, 2048)
"""Upper ends of the bands by which questions are counted, in tokens back to what is asked for."""
DEPTHS = 4
"""Parts of what stands before the first question, by which they are counted as well."""

Place = tuple[int, int]
"""Band of distance and part of what stands before the first question."""


@dataclass
class Tally:
    """Questions asked and answered rightly, by place.

    Attributes:
        asked: Number of questions.
        right: Number of those for which the right answer was the likeliest.
        surprise: The right answers' log-probabilities, added up and negated.
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
        """Return the share of right answers of each place."""
        return {place: self.right[place] / asked for place, asked in sorted(self.asked.items())}

    def count(self, place: Place, right: bool, logprob: float = 0.0) -> None:
        """Count one question."""
        self.asked[place] += 1
        self.right[place] += right
        self.surprise -= logprob

    def table(self) -> str:
        """Return the shares as a table, a line for each band of distances."""
        lines = []
        for distance in DISTANCES:
            cells = [
                f"{self.right[distance, depth]:5d}/{self.asked[distance, depth]:<5d}"
                for depth in range(DEPTHS)
            ]
            lines.append(f"up to {distance:4d} back: {' '.join(cells)}")
        return "\n".join([*lines, f"all: {self.share:.2%}, loss {self.loss:.4f}"])


def place(index: int, source: int, first: int) -> Place:
    """Return where a question at `index` belongs whose answer stands at `source`.

    The first question of the sequence is at `first`.
    """
    distance = next(band for band in DISTANCES if index - source <= band)
    return distance, int(source) * DEPTHS // int(first)


def sheets(seed: int, lengths: Iterable[int], text_share: float = 0.0) -> list[Sequence]:
    """Return sequences with a question for every second pair."""
    draw = np.random.default_rng(seed)
    return [recall_sequence(draw, length, text_share, length // 5) for length in lengths]


def count_answers(
    sequences: list[Sequence], ranks: list[list[int]], logprobs: list[list[float]]
) -> Tally:
    """Count the answers that were the likeliest token.

    Args:
        sequences: What was sent.
        ranks: Of each sequence's tokens from the second on; 1 is the likeliest.
        logprobs: Of the same tokens.
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
    """Return prompts of a sequence up to where its questions begin, and one question each.

    Returns:
        Prompts, their answers and places.
    """
    answers = np.flatnonzero(sequence.kinds == ANSWER)
    beginning = sequence.tokens[: answers[0] - 1].tolist()
    prompts, wanted, places = [], [], []
    for index in answers[:: max(1, len(answers) // count)][:count]:
        prompts.append([*beginning, int(sequence.tokens[index - 1])])
        wanted.append(int(sequence.tokens[index]))
        places.append(place(len(beginning) + 1, sequence.sources[index], answers[0]))
    return prompts, wanted, places


def copies(seed: int, lengths: Iterable[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Return prompts of symbols up to the copy mark and one symbol more, and what must follow."""
    draw = np.random.default_rng(seed)
    prompts, wanted = [], []
    for length in lengths:
        tokens = copy_sequence(draw, length, 0.0).tokens.tolist()
        cut = tokens.index(COPY) + 2
        prompts.append(tokens[:cut])
        wanted.append(tokens[cut:])
    return prompts, wanted
