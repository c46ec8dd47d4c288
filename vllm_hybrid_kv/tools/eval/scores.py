# SPDX-License-Identifier: Apache-2.0
"""Score next-token predictions, and compute statistics of the scores.

The scores of a window are float64 [3, positions]; position 0 predicts the second token. The rows:

- the log-probability of the actual next token
- the KL divergence from the reference's distribution, in nats
- whether the most probable token is one of the reference's most probable: 1 or 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch

MOST_ELEMENTS = 1 << 20
"""How many elements are computed at once in float64: 8 MiB, which fit into a CPU's cache."""

FIRST_RANGE = 16
"""Statistics are by ranges of context length. The first range ends here, the next twice as far."""


def score(logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Score the predictions at some positions.

    The divergence is KL(p || q) = sum p (ln p - ln q) over the whole vocabulary, with p the
    reference's distribution. It is computed in float64, because divergences of similar caches
    are as small as the rounding of float32.

    Args:
        logits: [positions, vocabulary], of any floating-point dtype.
        targets: [positions], the actual next tokens.
        reference: [positions, vocabulary], the reference's logits.
    """
    rows = max(MOST_ELEMENTS // logits.shape[-1], 1)
    scores = []
    for ours, theirs, actual in zip(
        logits.split(rows), reference.split(rows), targets.split(rows), strict=True
    ):
        q, p = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        # 0 ln 0 is 0. Rounding can make the sum for equal distributions negative.
        terms = (p.exp() * (p - q)).masked_fill(p.isneginf(), 0.0)
        # bfloat16 logits are often equal, so any of the reference's most probable tokens counts.
        agrees = theirs.gather(-1, ours.argmax(-1, keepdim=True)) == theirs.amax(-1, keepdim=True)
        logprobs = q.gather(-1, actual[:, None])
        divergences = terms.sum(-1, keepdim=True).clamp_min(0.0)
        scores.append(torch.cat([logprobs, divergences, agrees.double()], -1))
    return torch.cat(scores).T


@numpy.errstate(over="ignore", invalid="ignore")
def summarise(windows: Sequence[numpy.ndarray]) -> dict[str, Any]:
    """Return the statistics of one cache over the scores of one or more windows.

    Returns:
        `positions`, `perplexity`, `agreement` (share from 0 to 1); `divergence_mean`, its standard
        error `divergence_error`, the percentiles `divergence_p99` and `divergence_p999`, and
        `divergence_max`; `by_position`, statistics by range of context (`first` to `last` tokens).
    """
    logprobs, divergences, agreements = numpy.concatenate(windows, axis=1)
    contexts = numpy.concatenate([1 + numpy.arange(window.shape[1]) for window in windows])
    longest = int(contexts.max())

    def statistics(chosen: numpy.ndarray) -> dict[str, Any]:
        return {
            "positions": int(chosen.sum()),
            "perplexity": float(numpy.exp(-logprobs[chosen].mean())),
            "divergence_mean": float(divergences[chosen].mean()),
            "divergence_p99": float(numpy.percentile(divergences[chosen], 99)),
            "agreement": float(agreements[chosen].mean()),
        }

    by_position, first, end = [], 1, FIRST_RANGE
    while first <= longest:
        # The longest window has positions in every range, so no range is empty.
        row = statistics((contexts >= first) & (contexts < end))
        by_position.append({**row, "first": first, "last": min(end - 1, longest)})
        first, end = end, 2 * end
    return {
        **statistics(contexts > 0),
        "divergence_error": _error_of_mean([window[1] for window in windows]),
        "divergence_p999": float(numpy.percentile(divergences, 99.9)),
        "divergence_max": float(divergences.max()),
        "by_position": by_position,
    }


def _error_of_mean(windows: Sequence[numpy.ndarray]) -> float | None:
    """Return the standard error of the mean over all positions; None for a single window.

    The windows are the samples, because positions of one window depend on each other. Windows
    differ in length, so the mean is the sum of all scores divided by the sum of all lengths.
    """
    if len(windows) < 2:
        return None
    sums, lengths = numpy.array([(window.sum(), len(window)) for window in windows]).T
    residuals = sums - sums.sum() / lengths.sum() * lengths
    # The mean of the residuals is 0.
    return float(residuals.std(ddof=1) / len(windows) ** 0.5 / lengths.mean())
