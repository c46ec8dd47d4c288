# SPDX-License-Identifier: Apache-2.0
"""The report of a run, in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.fidelity.rules import FP8, KEY_RULES, OURS, STOCK, VALUE_RULES
from benchmarks.fidelity.sources import EVERY_RULE, RECORDED, SCORE_SIZES
from benchmarks.markdown import table

Row = dict[str, Any]

HEAVY_LIMIT = 0.8
"""Largest error of our rule, relative to stock's, on values with heavy tails."""

SHOWN_SIZE = 128
"""The head size whose rules the report compares."""


def _ratio(row: Row, kind: str) -> str:
    found = row["ours_to_stock"][kind]
    return f"{found['ratio']:.3f} +- {found['standard_error']:.3f}"


def _by_size(rows: list[Row], kind: str) -> list[str]:
    """Return our rule relative to stock's, by source and by head size and length."""
    sizes = sorted({(row["head_size"], row["length"]) for row in rows})
    cells = {(r["source"], (r["head_size"], r["length"])): _ratio(r, kind) for r in rows}
    lines = [
        [source, *(cells[source, size] for size in sizes)]
        for source in dict.fromkeys(row["source"] for row in rows)
    ]
    return table(["", *(f"{size}, {length}" for size, length in sizes)], lines)


def _rules(rows: list[Row], kind: str) -> list[str]:
    """Return every rule relative to stock's, and stock's error, by source."""
    lines = []
    for name in VALUE_RULES:
        errors = [row["values"][kind] for row in rows]
        if name == STOCK:
            lines.append([f"{name}: relative error", *(f"{of[name]:.4f}" for of in errors)])
        else:
            lines.append([name, *(f"{of[name] / of[STOCK]:.3f}" for of in errors)])
    return table(["", *(row["source"] for row in rows)], lines)


def _keys(rows: list[Row], kind: str) -> list[str]:
    lines = [[name, *(f"{row['keys'][kind][name]:.4f}" for row in rows)] for name in KEY_RULES]
    return table(["", *(row["source"] for row in rows)], lines)


def _goals(rows: list[Row]) -> list[str]:
    """Return every place that misses its goal by more than two standard errors."""
    missed, count = [], 0
    for row in rows:
        limit = HEAVY_LIMIT if row["heavy"] else 1.0
        place = f"{row['source']}, {row['head_size']} dims, {row['length']} tokens"
        for kind, found in row["ours_to_stock"].items():
            count += 1
            if found["ratio"] > limit + 2 * found["standard_error"]:
                condition = row["model"] if kind == RECORDED else f"scores of {kind}"
                missed.append(
                    f"* {place}, {condition}: {_ratio(row, kind)}; "
                    f"with exact values {found['keys_alone']:.3f}"
                )
    return [f"{count - len(missed)} of {count} meet the goals. The others:", "", *missed]


def _recorded(rows: list[Row]) -> list[str]:
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines += [
            "",
            f"## Recorded: {model}, head size {own[0]['head_size']}, {own[0]['length']} tokens",
            "",
            *table(
                [f"`{OURS}` relative to `{STOCK}`", *(row["source"] for row in own)],
                [[f"{own[0]['samples']} prompts", *(_ratio(row, RECORDED) for row in own)]],
            ),
            "",
            f"Every rule, {EVERY_RULE} prompts:",
            "",
            *_rules([*own, _mean_of(own)], RECORDED),
            "",
            *_keys(own, RECORDED),
        ]
    return lines


def _mean_of(rows: list[Row]) -> Row:
    errors = [row["values"][RECORDED] for row in rows]
    means = {name: statistics.fmean(of[name] for of in errors) for name in VALUE_RULES}
    return {"source": "mean", "values": {RECORDED: means}}


def _samples(result: Row, times: int) -> str:
    seeds = result["seeds"].items()
    return " and ".join(f"{times * count} of {length} tokens" for length, count in seeds)


def markdown(result: Row) -> str:
    """Return the report."""
    rows, machine = result["distributions"], result["machine"]
    lines = [
        "# Errors of attention with keys and values stored by different rules",
        "",
        f"{machine['cpu']}; Python {machine['Python']}, torch {machine['torch']}; samples of "
        f"`{OURS}` and `{STOCK}`: {_samples(result, result['many'])}, of the other rules "
        f"{_samples(result, 1)}; `+-` is a standard error over the samples.",
        "",
        f"Relative errors of attention outputs. All rules except `{FP8}` store a value in 4 bits, "
        "with an fp16 scale and zero for D of them; all store keys in e4m3. A score's standard "
        "deviation over the keys is 1 in one table and 2 in the other.",
    ]
    for size in SCORE_SIZES:
        lines += ["", f"## `{OURS}` relative to `{STOCK}`, scores of {size:g}", ""]
        lines += ["Head size, tokens:", "", *_by_size(rows, f"{size:g}")]
    lines += ["", f"## Goals: {HEAVY_LIMIT} with heavy tails, otherwise 1", ""]
    lines += _goals([*rows, *result["recorded"]])
    kind = f"{SCORE_SIZES[0]:g}"
    for length in sorted({row["length"] for row in rows}):
        own = [r for r in rows if (r["head_size"], r["length"]) == (SHOWN_SIZE, length)]
        title = f"Rules relative to `{STOCK}`: {SHOWN_SIZE} dims, {length} tokens, scores of {kind}"
        lines += ["", f"## {title}", "", *_rules(own, kind)]
        lines += ["", "Keys alone, relative errors:", "", *_keys(own, kind)]
    lines += _recorded(result["recorded"])
    return "\n".join(lines) + "\n"
