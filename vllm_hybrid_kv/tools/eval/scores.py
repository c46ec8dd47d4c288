# SPDX-License-Identifier: Apache-2.0
"""How far one prediction is from another, and how good it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_ELEMENTS = 1 << 24
"""Of a slice that is computed at once in float64; 128 MiB."""


@dataclass(frozen=True)
class Scores:
    """What the predictions at some positions came to.

    Attributes:
        logprobs: The log-probability of the token that came, by position.
        divergences: KL divergence from the reference's distribution, in nats, by position.
        agreements: Whether the most probable token is one of the reference's most probable.
    """

    logprobs: list[float]
    divergences: list[float]
    agreements: list[bool]


def score(
    logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None
) -> Scores:
    """Score predictions of the next token.

    The divergence is KL(p || q) = sum p (ln p - ln q) over the whole vocabulary, p the reference's
    distribution and q the one that is scored. It is computed in float64: of caches that are nearly
    alike it is of the size of float32's rounding.

    Args:
        logits: [positions, vocabulary], of any floating-point dtype.
        targets: [positions], the tokens that came.
        reference: [positions, vocabulary], the reference's logits; None to score the reference.
    """
    found = Scores([], [], [])
    rows = max(MOST_ELEMENTS // logits.shape[-1], 1)
    for at in range(0, len(logits), rows):
        part = slice(at, at + rows)
        ours = logits[part].double().log_softmax(-1)
        came = ours.gather(-1, targets[part, None]).squeeze(-1)
        found.logprobs.extend(came.tolist())
        if reference is None:
            found.divergences.extend([0.0] * len(ours))
            found.agreements.extend([True] * len(ours))
            continue
        theirs = reference[part].double().log_softmax(-1)
        found.divergences.extend(_divergence(theirs, ours).tolist())
        found.agreements.extend(_agree(reference[part], logits[part]).tolist())
    return found


def _divergence(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    terms = theirs.exp() * (theirs - ours)
    # 0 ln 0 is 0. Rounding can make the sum of equal distributions less than nothing.
    impossible = torch.isneginf(theirs)
    return terms.masked_fill(impossible, 0.0).sum(-1).clamp_min(0.0)


def _agree(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    # Logits in bfloat16 tie.
    chosen = reference.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    return chosen == reference.amax(-1)
