# SPDX-License-Identifier: Apache-2.0
"""The result of an evaluation as JSON, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.tools.output import Table, figure

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.eval.scores import Scores
    from vllm_hybrid_kv.tools.eval.summary import Summary

FEW = 1000
"""Positions below which a 99.9th percentile is nearly the maximum."""

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#555555")
"""Distinguishable by the colour-blind (Paul Tol)."""

SMALLEST = 1e-9
"""Nats; smaller divergences are drawn as this, because the axis is logarithmic."""


@dataclass(frozen=True)
class CacheResult:
    """The result for one cache.

    Attributes:
        name: The cache on the command line.
        error: Why it could not be measured; empty if it was.
        summary: Its statistics, if it was measured.
        facts: Facts of its engine.
        scored: Scores by sequence.
    """

    name: str
    error: str = ""
    summary: Summary | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    scored: Sequence[Scores] = ()

    def to_json(self) -> dict[str, Any]:
        numbers = {**self.facts, **self.summary.to_json()} if self.summary else {}
        return {"name": self.name, "reason": self.error or None, **numbers}

    @property
    def folded_name(self) -> str:
        """The name with its settings on a second line."""
        return self.name.replace("[", "\n").removesuffix("]")


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        model: The model on the command line.
        data: The file on the command line.
        sequences: Number of windows.
        positions: Predictions with each cache.
        longest: Tokens of the longest window.
        versions: Versions of vLLM and the plugin.
        caches: The caches, the reference first.
    """

    model: str
    data: str
    sequences: int
    positions: int
    longest: int
    versions: Mapping[str, str]
    caches: Sequence[CacheResult]

    @property
    def measured(self) -> list[tuple[CacheResult, Summary]]:
        """The caches that could be measured, with their statistics."""
        return [(cache, cache.summary) for cache in self.caches if cache.summary]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON: divergences in nats, shares from 0 to 1."""
        return {
            **{name: value for name, value in vars(self).items() if name != "caches"},
            "reference": self.caches[0].name,
            "caches": [cache.to_json() for cache in self.caches],
        }


def report(evaluation: Evaluation) -> Iterator[Table | str]:
    """Yield the lines and tables to print."""
    reference = evaluation.caches[0]
    facts = reference.facts
    yield (
        f"{evaluation.model} in {facts['dtype']} on {facts['device']}, vLLM "
        f"{evaluation.versions['vllm']}: {evaluation.positions:,} predictions in "
        f"{evaluation.sequences:,} windows of up to {evaluation.longest:,} tokens"
    )
    if facts["quantised_layers"]:
        yield (
            f"note: the model's configuration makes {reference.name} {facts['cache_dtype']}; use "
            "--reference bfloat16 to compare with an unquantised cache"
        )
    yield _by_cache(evaluation)
    yield _by_position(evaluation)


def _by_cache(evaluation: Evaluation) -> Table:
    few = evaluation.positions < FEW
    columns = ("cache", "quantised", ">perplexity", ">mean KL", ">99 %", ">99.9 %")
    rows = []
    for cache, summary in evaluation.measured:
        quantised, error = cache.facts["quantised_layers"], summary.divergence_error
        rows.append(
            (
                cache.folded_name,
                f"{quantised} of {quantised + cache.facts['unquantised_layers']}",
                _perplexity(summary.perplexity),
                f"{summary.divergence_mean:.5f}" + ("" if error is None else f" ± {error:.5f}"),
                f"{summary.divergence_p99:.4f}",
                "too few" if few else f"{summary.divergence_p999:.4f}",
                f"{summary.divergence_max:.3f}",
                f"{100 * summary.agreement:.2f} %",
            )
        )
    return Table(
        f"KL divergence of the next token from {evaluation.caches[0].name}, nats",
        (*columns, ">largest", ">top-1"),
        rows,
        "quantised: attention layers; top-1: the most probable token is the same",
    )


def _by_position(evaluation: Evaluation) -> Table:
    (_, reference), *others = evaluation.measured
    rows = [
        (
            f"{row.first:,}-{row.last:,}",
            f"{row.positions:,}",
            _perplexity(row.perplexity),
            *(
                f"{part.divergence_mean:.5f} {100 * part.agreement:5.1f} %"
                for part in (summary.by_position[number] for _, summary in others)
            ),
        )
        for number, row in enumerate(reference.by_position)
    ]
    names = (f">{cache.folded_name}" for cache, _ in others)
    return Table(
        "by tokens of context: mean KL divergence, top-1 agreement",
        (">context", ">predictions", ">perplexity", *names),
        rows,
        "perplexity: of the reference",
    )


def _perplexity(perplexity: float) -> str:
    return f"{perplexity:,.{0 if perplexity >= 1e4 else 3}f}"


def draw(path: Path, evaluation: Evaluation) -> None:
    """Draw the KL divergence by position and its tail, for each cache but the reference."""
    import numpy

    with figure(path, 1, 2, figsize=(13, 5)) as (drawn, (left, right)):
        drawn.suptitle(
            f"{Path(evaluation.model).name}: KL divergence of the next token from "
            f"{evaluation.caches[0].name}, {evaluation.positions:,} predictions"
        )
        for number, cache in enumerate(evaluation.caches[1:]):
            if (summary := cache.summary) is None:
                continue
            colour = COLOURS[number % len(COLOURS)]
            middles = [(row.first * row.last) ** 0.5 for row in summary.by_position]
            means = [max(row.divergence_mean, SMALLEST) for row in summary.by_position]
            tails = [max(row.divergence_p99, SMALLEST) for row in summary.by_position]
            left.plot(middles, means, color=colour, marker="o", markersize=4)
            left.plot(middles, tails, color=colour, linestyle="--", linewidth=1)
            values = numpy.sort(numpy.concatenate([one.divergences for one in cache.scored]))
            above = 1 - numpy.arange(len(values)) / len(values)
            shown = values >= SMALLEST
            label = f"{cache.name}, mean {summary.divergence_mean:.2g}"
            right.plot(values[shown], above[shown], color=colour, label=label)
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
        left.set(yscale="log", xlabel="tokens of context", ylabel="nats")
        left.set_title("by position: mean, and 99 % dashed", fontsize=10)
        right.set(xscale="log", yscale="log", xlabel="nats", ylabel="share of predictions above")
        right.set_title("the tail", fontsize=10)
        for share, name in ((1e-2, "99 %"), (1e-3, "99.9 %")):
            if evaluation.positions * share >= 1:
                right.axhline(share, color="#999999", linewidth=0.8, linestyle=":")
                right.annotate(name, (0.01, share), xycoords=("axes fraction", "data"), va="bottom")
        handles, labels = right.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=2)
