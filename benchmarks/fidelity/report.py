# SPDX-License-Identifier: Apache-2.0
"""Write the report of a run, in Markdown."""

from __future__ import annotations

from typing import Any

from benchmarks.fidelity.rules import FORMAT_1, FORMAT_2, FP8, PARTS, RULES, VLLM
from benchmarks.markdown import table

Row = dict[str, Any]


def _ratio(row: Row, name: str) -> str:
    return "{:.3f} ± {:.3f}".format(*row["ratios"][name])


def _by_size(rows: list[Row], name: str) -> list[str]:
    """Make a table of one rule's `ratios`, with a row per source and a column per size."""
    sizes = sorted({(row["head_size"], row["length"]) for row in rows})
    cells = {(row["source"], (row["head_size"], row["length"])): _ratio(row, name) for row in rows}
    sources = dict.fromkeys(row["source"] for row in rows)
    return table(
        ["", *(f"{size}, {length}" for size, length in sizes)],
        [[source, *(cells[source, size] for size in sizes)] for source in sources],
    )


def _errors(rows: list[Row], head: str) -> list[str]:
    """Make a table of errors, with a row per source and a column per rule."""
    return table(
        [head, *RULES, *PARTS],
        [[row["source"], *(f"{row['errors'][n]:.4f}" for n in (*RULES, *PARTS))] for row in rows],
    )


def _losses(rows: list[Row]) -> list[str]:
    """List where format 2 (today's) is worse than format 1 by more than two standard errors."""
    lost = [
        f"* {row['source']}, {row['head_size']} dims, {row['length']} tokens, "
        f"{row.get('model', 'scores of ' + row['kind'])}: {_ratio(row, FORMAT_1)} times, "
        f"{row['errors'][FORMAT_1]:.4f} to {row['errors'][FORMAT_2]:.4f}"
        for row in rows
        if row["ratios"][FORMAT_1][0] > 1 + 2 * row["ratios"][FORMAT_1][1]
    ]
    return [f"{len(rows) - len(lost)} of {len(rows)} errors are not above format 1's. The others:",
            "", *(lost or ["* none"])]  # fmt: skip


def _recorded(rows: list[Row]) -> list[str]:
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        means = {name: sum(r["errors"][name] for r in own) / len(own) for name in own[0]["errors"]}
        title = f"{model}, head size {own[0]['head_size']}, {own[0]['length']} tokens"
        lines += ["", f"## Recorded: {title}, {own[0]['samples']} prompts", ""]
        lines += _errors([*own, {"source": "mean", "errors": means}], "relative errors")
    return lines


def markdown(result: Row) -> str:
    rows, machine, shown = result["distributions"], result["machine"], result["shown"]
    counts = " and ".join(f"{count} of {length}" for length, count in result["seeds"].items())
    lines = [
        "# Errors of attention with keys and values stored by different rules",
        "",
        f"`{result['command']}` on {machine['cpu']}; Python {machine['Python']}, torch "
        f"{machine['torch']}; samples: {counts} tokens; ± is a standard error over the samples.",
        "",
        f"Relative errors of attention outputs. `{FORMAT_2}` is the stored page format, with "
        "queries rounded to int8 as in the kernels. The other rules have exact queries: "
        f"`{FORMAT_1}`, the format before it (keys in e4m3, values rotated, minimum and maximum "
        f"as range), `{VLLM}` (keys in e4m3, values between minimum and maximum), and `{FP8}`, "
        "rounding of both to the nearest e4m3 numbers, which takes 16 bits for a pair instead of "
        "12. Scores have this standard deviation over the keys.",
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        for name in (FORMAT_1, VLLM, FP8):
            title = f"`{FORMAT_2}` relative to `{name}`, scores of {kind}"
            lines += ["", f"## {title}", "", "Head size, tokens:", "", *_by_size(own, name)]
    lines += ["", f"## Where `{FORMAT_2}` loses to `{FORMAT_1}`", ""]
    lines += _losses([*rows, *result["recorded"]])
    size, length = shown
    for kind in dict.fromkeys(row["kind"] for row in rows):
        title = f"Rules and their parts, {size} dims, {length} tokens, scores of {kind}"
        own = [r for r in rows if (r["head_size"], r["length"], r["kind"]) == (size, length, kind)]
        lines += ["", f"## {title}", "", *_errors(own, "relative errors")]
    return "\n".join([*lines, *_recorded(result["recorded"])]) + "\n"
