# SPDX-License-Identifier: Apache-2.0
"""The report of a run, in Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.fidelity.prompts import EVERY_RULE
from benchmarks.fidelity.rules import FP8, KEY_RULES, OURS, STOCK, VALUE_RULES
from benchmarks.fidelity.sources import RECORDED, SCORE_SIZES

Row = dict[str, Any]

HEAVY_LIMIT = 0.8
"""What ours may err at most relative to stock's rule where tails are heavy."""

SHOWN_SIZE = 128
"""The head size whose rules are shown side by side."""


def _ratio(row: Row, kind: str, name: str) -> float:
    errors = row["values"][kind]
    return float(errors[name] / errors[STOCK])


def _with_doubt(row: Row, kind: str) -> str:
    found = row["beside_stock"][kind]
    return f"{found['ratio']:.3f} +- {found['doubt']:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _sources(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["source"] for row in rows))


def _ours_beside_stock(rows: list[Row], kind: str) -> list[str]:
    sizes = sorted({(row["head_size"], row["length"]) for row in rows})
    lines = []
    for source in _sources(rows):
        cells = [
            _with_doubt(row, kind)
            for size in sizes
            for row in rows
            if row["source"] == source and (row["head_size"], row["length"]) == size
        ]
        lines.append([source, *cells])
    return _table(["", *(f"{size}, {length}" for size, length in sizes)], lines)


def _rules(rows: list[Row], kind: str) -> list[str]:
    """Every rule beside stock's, for rows of different sources."""
    lines = []
    for name in VALUE_RULES:
        if name == STOCK:
            cells = [f"{row['values'][kind][name]:.4f}" for row in rows]
            lines.append([f"{name}: relative error", *cells])
        else:
            lines.append([name, *(f"{_ratio(row, kind, name):.3f}" for row in rows)])
    return _table(["", *(row["source"] for row in rows)], lines)


def _keys(rows: list[Row], kind: str) -> list[str]:
    lines = [
        [name, *(f"{row['keys'][kind][name]:.4f}" for row in rows)] for name in KEY_RULES
    ]  # fmt: skip
    return _table(["", *(row["source"] for row in rows)], lines)


def _goals(rows: list[Row]) -> list[str]:
    """Every place where a goal is missed by more than two standard errors."""
    missed, count = [], 0
    for row in rows:
        limit = HEAVY_LIMIT if row["heavy"] else 1.0
        place = f"{row['source']}, {row['head_size']} dims, {row['length']} tokens"
        for kind, found in row["beside_stock"].items():
            count += 1
            if found["ratio"] > limit + 2 * found["doubt"]:
                which = row["model"] if kind == RECORDED else f"scores of {kind}"
                missed.append(
                    f"* {place}, {which}: {_with_doubt(row, kind)}; "
                    f"with values stored exactly {found['of keys alone']:.3f}"
                )
    return [f"{count - len(missed)} of {count} within the goals. Not within:", "", *missed]


def _recorded(rows: list[Row]) -> list[str]:
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines += [
            "",
            f"## Recorded: {model}, head size {own[0]['head_size']}, {own[0]['length']} tokens",
            "",
            *_table(
                [f"`{OURS}` relative to `{STOCK}`", *(row["source"] for row in own)],
                [[f"{own[0]['samples']} prompts", *(_with_doubt(row, RECORDED) for row in own)]],
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
    """A row of the rows' mean errors."""
    return {
        "source": "mean",
        "values": {
            RECORDED: {
                name: statistics.fmean(row["values"][RECORDED][name] for row in rows)
                for name in VALUE_RULES
            }
        },
    }


def _samples(result: Row, times: int) -> str:
    seeds = result["seeds"].items()
    return " and ".join(f"{times * count} of {length} tokens" for length, count in seeds)


def text(result: Row) -> str:
    """Return the report."""
    rows, where = result["distributions"], result["machine"]
    lines = [
        "# Errors of attention with keys and values stored by different rules",
        "",
        f"{where['cpu']}; Python {where['Python']}, torch {where['torch']}; samples of `{OURS}` "
        f"and `{STOCK}`: {_samples(result, result['many'])}, of the other rules "
        f"{_samples(result, 1)}; `+-` is a standard error over the samples.",
        "",
        f"Relative errors of attention outputs. All rules but `{FP8}` store a value in 4 bits and "
        "an fp16 scale and zero for D of them; all store keys in e4m3. A score's standard "
        "deviation over the keys is 1 in one table and 2 in the other.",
    ]
    for size in SCORE_SIZES:
        lines += [
            "",
            f"## `{OURS}` relative to `{STOCK}`, scores of {size:g}",
            "",
            "Head size, tokens:",
            "",
            *_ours_beside_stock(rows, f"{size:g}"),
        ]
    lines += [
        "",
        f"## Goals: {HEAVY_LIMIT} where tails are heavy, 1 elsewhere",
        "",
        *_goals([*rows, *result["recorded"]]),
    ]
    for length in sorted({row["length"] for row in rows}):
        own = [r for r in rows if (r["head_size"], r["length"]) == (SHOWN_SIZE, length)]
        kind = f"{SCORE_SIZES[0]:g}"
        lines += [
            "",
            f"## Rules relative to `{STOCK}`: {SHOWN_SIZE} dims, {length} tokens, scores of {kind}",
            "",
            *_rules(own, kind),
            "",
            "Keys alone, relative errors:",
            "",
            *_keys(own, kind),
        ]
    lines += _recorded(result["recorded"])
    return "\n".join(lines) + "\n"
