# SPDX-License-Identifier: Apache-2.0
"""A picture of an evaluation: KL divergence by position, and how its tail falls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.tools.eval.report import Column, Evaluation
from vllm_hybrid_kv.tools.output import figure

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.eval.summary import Summary

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#555555")
"""Told apart by the colour-blind as well (Paul Tol)."""

SMALLEST = 1e-9
"""Nats below which a divergence is drawn as this, for the scale is logarithmic."""


def draw(path: Path, evaluation: Evaluation) -> None:
    """Draw the caches that are not the reference.

    Args:
        path: The file; its ending is the format.
        evaluation: What was measured.

    Raises:
        OSError: It cannot be written.
        ValueError: matplotlib does not know the format.
    """
    shown = [
        (column, column.summary, COLOURS[number % len(COLOURS)])
        for number, column in enumerate(evaluation.columns[1:])
        if column.summary is not None
    ]
    with figure(path, 1, 2, figsize=(13, 5)) as (drawn, (left, right)):
        drawn.suptitle(
            f"{Path(evaluation.model).name}: KL divergence of the next token from "
            f"{evaluation.columns[0].name}, {evaluation.positions:,} predictions"
        )
        for column, summary, colour in shown:
            _draw_by_position(left, column, summary, colour)
            _draw_tail(right, column, summary, colour)
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


def _draw_by_position(axes: Any, column: Column, summary: Summary, colour: str) -> None:
    middles = [(row.first * row.last) ** 0.5 for row in summary.by_position]
    means = [max(row.divergence_mean, SMALLEST) for row in summary.by_position]
    tails = [max(row.divergence_p99, SMALLEST) for row in summary.by_position]
    axes.plot(middles, means, color=colour, marker="o", markersize=4)
    axes.plot(middles, tails, color=colour, linestyle="--", linewidth=1)


def _draw_tail(axes: Any, column: Column, summary: Summary, colour: str) -> None:
    import numpy

    divergences = numpy.sort(numpy.concatenate([one.divergences for one in column.scored]))
    share = 1 - numpy.arange(len(divergences)) / len(divergences)
    drawn = divergences >= SMALLEST
    label = f"{column.name}, mean {summary.divergence_mean:.2g}"
    axes.plot(divergences[drawn], share[drawn], color=colour, label=label)
