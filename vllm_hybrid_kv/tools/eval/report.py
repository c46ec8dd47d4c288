# SPDX-License-Identifier: Apache-2.0
"""An evaluation as text: the caches side by side, and the same by position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.tools.output import Table

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.eval.folder import Scored
    from vllm_hybrid_kv.tools.eval.summary import Range, Summary

FEW = 1000
"""Positions below which a 99.9th percentile is as good as the largest."""


@dataclass(frozen=True)
class Column:
    """One cache: what it came to, or why it could not be measured.

    Attributes:
        name: How it was asked for.
        reason: Why there are no numbers.
        summary: The numbers.
        facts: What its engine said of itself.
        scored: By sequence; for the plot.
    """

    name: str
    reason: str = ""
    summary: Summary | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    scored: Sequence[Scored] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it, None for numbers that there are not."""
        return {
            "name": self.name,
            "reason": self.reason or None,
            **({} if self.summary is None else {**self.facts, **self.summary.to_json()}),
        }


@dataclass(frozen=True)
class Evaluation:
    """What was asked for and what came of it.

    Attributes:
        model: As given.
        data: As given.
        sequences: Windows of it.
        positions: Predictions in each column.
        longest: Tokens of the longest window.
        versions: Of vLLM and the plugin.
        columns: The caches, the reference first.
    """

    model: str
    data: str
    sequences: int
    positions: int
    longest: int
    versions: Mapping[str, str]
    columns: Sequence[Column]

    @property
    def measured(self) -> list[tuple[str, Summary]]:
        """The columns that have numbers."""
        return [(column.name, column.summary) for column in self.columns if column.summary]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it; divergences in nats, shares from 0 to 1."""
        return {
            "model": self.model,
            "data": self.data,
            "sequences": self.sequences,
            "positions": self.positions,
            "longest": self.longest,
            "versions": dict(self.versions),
            "reference": self.columns[0].name,
            "caches": [column.to_json() for column in self.columns],
        }


def report(evaluation: Evaluation) -> Iterator[Table | str]:
    """Give what is to be printed, part by part."""
    reference = evaluation.columns[0]
    facts = reference.facts
    yield (
        f"{evaluation.model} in {facts['dtype']} on {facts['device']}, vLLM "
        f"{evaluation.versions['vllm']}: {evaluation.positions:,} predictions in "
        f"{evaluation.sequences:,} windows of up to {evaluation.longest:,} tokens"
    )
    if facts["quantised_layers"]:
        yield (
            f"note: {reference.name} is {facts['cache_dtype']} by the model's own configuration; "
            "compare with the unquantised cache by --reference bfloat16"
        )
    yield _side_by_side(evaluation)
    yield _by_position(evaluation)


def _side_by_side(evaluation: Evaluation) -> Table:
    few = evaluation.positions < FEW
    numbers: dict[str, Callable[[Summary], str]] = {
        "perplexity": lambda s: _perplexity(s.perplexity),
        "mean KL": lambda s: _with_error(s),
        "99 %": lambda s: f"{s.divergence_p99:.4f}",
        "99.9 %": lambda s: "too few" if few else f"{s.divergence_p999:.4f}",
        "largest": lambda s: f"{s.divergence_max:.3f}",
        "top-1": lambda s: f"{100 * s.agreement:.2f} %",
    }
    return Table(
        f"KL divergence of the next token from {evaluation.columns[0].name}, nats",
        ("cache", "quantised", *(f">{name}" for name in numbers)),
        [
            (
                _folded(column.name),
                _layers(column.facts),
                *(value(column.summary) for value in numbers.values()),
            )
            for column in evaluation.columns
            if column.summary is not None
        ],
        "quantised: attention layers; top-1: the most probable token is the same.",
    )


def _folded(name: str) -> str:
    """Return a cache's name with its settings on a line of their own."""
    return name.replace("[", "\n").removesuffix("]")


def _perplexity(perplexity: float) -> str:
    return f"{perplexity:,.{0 if perplexity >= 1e4 else 3}f}"


def _layers(facts: Mapping[str, Any]) -> str:
    quantised = facts["quantised_layers"]
    return f"{quantised} of {quantised + facts['unquantised_layers']}"


def _with_error(summary: Summary) -> str:
    error = summary.divergence_error
    return f"{summary.divergence_mean:.5f}" + ("" if error is None else f" ± {error:.5f}")


def _by_position(evaluation: Evaluation) -> Table:
    (_, reference), *others = evaluation.measured
    return Table(
        "Mean KL divergence and top-1 agreement by tokens of context",
        (
            *(">context", ">predictions", ">perplexity"),
            *(f">{_folded(name)}" for name, _ in others),
        ),
        [
            (
                f"{row.first:,}-{row.last:,}",
                f"{row.positions:,}",
                _perplexity(row.perplexity),
                *(_cell(summary.by_position[number]) for _, summary in others),
            )
            for number, row in enumerate(reference.by_position)
        ],
        "Perplexity is the reference's.",
    )


def _cell(row: Range) -> str:
    return f"{row.divergence_mean:.5f} {100 * row.agreement:5.1f} %"
