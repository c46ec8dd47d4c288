# SPDX-License-Identifier: Apache-2.0
"""Compare outputs of engines: up to rounding, or with those of an unquantised cache."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from testing.engine_host import Output
from testing.models import SCORE_SIZE
from vllm_hybrid_kv.kernels import k8v4


@dataclass(frozen=True)
class Bounds:
    """Rounding may move 19 of 20 log-probabilities by `rounding`, and the others by `limit`."""

    rounding: float
    farthest: float = 0.0

    @property
    def limit(self) -> float:
        """The largest allowed difference of a log-probability."""
        return max(self.rounding, self.farthest)


@dataclass(frozen=True)
class Comparison:
    """The result of comparing outputs.

    Attributes:
        tokens: Number of tokens compared.
        apart: The largest difference of a log-probability.
        different: The differences that rounding does not explain, a sentence each.
    """

    tokens: int
    apart: float
    different: list[str]


def decisive(output: Output, bounds: Bounds) -> int:
    """Count the tokens before the first one that rounding could change.

    If the log-probabilities of the two best tokens differ by at most twice the rounding, a correct
    engine may choose either token. All later tokens depend on this choice.
    """
    close = (i for i, margin in enumerate(output.margins) if margin <= 2 * bounds.rounding)
    return next(close, len(output.margins))


def is_decisive(output: Output, bounds: Bounds) -> bool:
    """Return whether every token of the output beat the second best by more than rounding."""
    return decisive(output, bounds) == len(output.margins)


def compare(
    outputs: Sequence[Output], expected: Sequence[Output], bounds: Bounds, whole: bool = False
) -> Comparison:
    """Compare tokens and log-probabilities with those of the reference.

    If `whole`, compares all tokens, otherwise those before the first that rounding could change.
    """
    tokens, different = 0, []
    differences: list[float] = []
    for i, (output, wanted) in enumerate(zip(outputs, expected, strict=True)):
        count = len(wanted.tokens) if whole else decisive(wanted, bounds)
        tokens += count
        pairs = zip(output.tokens[:count], wanted.tokens[:count], strict=False)
        unequal = next((at for at, (got, want) in enumerate(pairs) if got != want), None)
        if len(output.tokens) < count:
            different.append(f"prompt {i}: {len(output.tokens)} tokens of {count}")
        elif unequal is not None:
            different.append(
                f"prompt {i}: token {unequal} is {output.tokens[unequal]}, not "
                f"{wanted.tokens[unequal]}, which was {wanted.margins[unequal]:.2f} ahead"
            )
        else:
            logprobs = zip(output.logprobs[:count], wanted.logprobs[:count], strict=True)
            differences += [abs(a - b) for a, b in logprobs]
    apart = max(differences, default=0.0)
    # `not <=` instead of `>`, because every comparison with NaN is false.
    if not all(difference <= bounds.limit for difference in differences):
        different.append(f"log-probabilities up to {apart:.3f} apart, {bounds.limit} allowed")
    far = sum(not difference <= bounds.rounding for difference in differences)
    # One of twenty may differ by more than `bounds.rounding`. Of fewer than twenty, one may too.
    if far > max(1, len(differences) / 20):
        different.append(
            f"{far} of {len(differences)} log-probabilities more than {bounds.rounding} apart"
        )
    return Comparison(tokens, apart, different)


def format_error(head_size: int) -> float:
    """Estimate the error of one layer's attention output with k8v4, relative to the output.

    The largest magnitude of D normal numbers is about sqrt(2 ln D) standard deviations, and
    rotated keys, values and queries are nearly normal. Rounding to the nearest step causes an error
    with a standard deviation of step / sqrt(12).

    * Values: a step is 1/8 of the largest magnitude. The relative error is
      e_v = sqrt(2 ln D) / (8 sqrt(12)): 0.104 at D = 64, 0.112 at D = 128.
    * Keys and queries: a step is 1/127 of the largest magnitude. The relative error of each is
      e = sqrt(2 ln D) / (127 sqrt(12)): 0.0066 at D = 64. The errors of D elements add up in a
      score as the products do, so a score is off by sqrt(2) e of the scores' standard deviation S
      (`SCORE_SIZE`), and a softmax weight by e_s = sqrt(2) e S. Errors of many weights add up as
      the weighted values do: the output is off by e_s too.

    Together, the two errors are sqrt(e_v^2 + e_s^2).
    """
    largest = math.sqrt(2 * math.log(head_size))
    value_error = largest / (k8v4.VALUE_STEPS * math.sqrt(12))
    rounding = largest / (k8v4.KEY_STEPS * math.sqrt(12))
    return math.hypot(value_error, math.sqrt(2) * rounding * SCORE_SIZE)


UNQUANTISED_ENDS = {"boundary_layers": 2}
"""The bounds of `errors_of` require these settings: two layers at each end stay unquantised. With
random weights, later layers amplify the first layers' errors. In float32 transformers with
`reference.quantise`, the mean errors of Llama's and Gemma 3's shapes are then 0.05 and 0.08. If all
layers are quantised, they are 0.14 and 0.29. The bound is 0.084 at D = 64."""


def errors_of(
    measured: Sequence[float], unquantised: Sequence[float], head_size: int, spread: float
) -> dict[str, tuple[float, float]]:
    """Return how far log-probabilities with a k8v4 cache are from unquantised ones, with bounds.

    A layer's output (attention, residual stream and other branches) has a relative error below
    e = `format_error`. Later layers pass on the errors that they receive, and add their own. The
    bounds assume that logits are then off by at most e standard deviations. The mean of
    normal errors would be sqrt(2/pi) e. Tails are heavier, because some positions attend to few
    tokens and others to many. With the exponential tails of a Laplace distribution, 99 of 100
    errors are within ln(100) / sqrt(2) = 3.26 e, and the largest of 2000 errors is expected at
    5.4 e. The bound on the largest error is 8 e. `spread` is the standard deviation of an
    unquantised engine's log-probabilities.
    """
    unit = format_error(head_size) * spread
    errors = sorted(abs(a - b) for a, b in zip(measured, unquantised, strict=True))
    return {
        "mean": (statistics.fmean(errors), math.sqrt(2 / math.pi) * unit),
        "99 of 100": (errors[int(0.99 * len(errors))], 3.26 * unit),
        "largest": (errors[-1], 8 * unit),
    }


def exceeded_bounds(errors: Mapping[str, Sequence[float]]) -> list[str]:
    """Describe each error from `errors_of` that exceeds its bound."""
    # `not <=` instead of `>`, because NaN is out of bounds too.
    return [
        f"{name} {e:.3f} > {bound:.3f}" for name, (e, bound) in errors.items() if not e <= bound
    ]


def far_from_unquantised(
    measured: Sequence[float], unquantised: Sequence[float], head_size: int, spread: float
) -> tuple[float, list[str]]:
    """Return the mean of `errors_of`, and the bounds that are exceeded."""
    errors = errors_of(measured, unquantised, head_size, spread)
    return errors["mean"][0], exceeded_bounds(errors)
