# SPDX-License-Identifier: Apache-2.0
"""Scores of next-token predictions: log-probability, KL divergence and top-1 agreement."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

MOST_ELEMENTS = 1 << 24
"""Elements of a slice that is computed at once in float64: 128 MiB."""


@dataclass
class Scores:
    """Scores by position; position 0 predicts the second token.

    Attributes:
        logprobs: Log-probability of the actual next token.
        divergences: KL divergence from the reference's distribution, in nats.
        agreements: Whether the most probable token is one of the reference's most probable.
    """

    logprobs: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.logprobs)

    def add(
        self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None
    ) -> None:
        """Append the scores of further positions.

        The divergence is KL(p || q) = sum p (ln p - ln q) over the whole vocabulary, with p the
        reference's distribution. It is computed in float64, because divergences of similar caches
        are as small as the rounding of float32.

        Args:
            logits: [positions, vocabulary], of any floating-point dtype.
            targets: [positions], the actual next tokens.
            reference: [positions, vocabulary], the reference's logits; None to score the
                reference itself.
        """
        rows = max(MOST_ELEMENTS // logits.shape[-1], 1)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            ours = logits[part].double().log_softmax(-1)
            self.logprobs += ours.gather(-1, targets[part, None]).squeeze(-1).tolist()
            if reference is None:
                self.divergences += [0.0] * len(ours)
                self.agreements += [True] * len(ours)
            else:
                theirs = reference[part].double().log_softmax(-1)
                self.divergences += _divergence(theirs, ours).tolist()
                self.agreements += _agree(reference[part], logits[part]).tolist()


def _divergence(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    terms = theirs.exp() * (theirs - ours)
    # 0 ln 0 is 0. Rounding can make the sum for equal distributions negative.
    return terms.masked_fill(torch.isneginf(theirs), 0.0).sum(-1).clamp_min(0.0)


def _agree(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    # Logits in bfloat16 tie.
    top = reference.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    return top == reference.amax(-1)
