# SPDX-License-Identifier: Apache-2.0
"""Write a result as Markdown tables and a picture, and compare it with vLLM's own strategy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import machine, table
from benchmarks.prefix_cache.cases import (
    ATTENTION_ONLY,
    FIXED_POINT,
    HYBRID_AWARE,
    PARTS,
    STOCK,
    STOCK_16,
    STRATEGIES,
)

Row = Mapping[str, Any]


def markdown(result: Mapping[str, Any]) -> str:
    lines = [
        "# Prefix cache hits in vLLM's scheduler, without a model",
        "",
        f"{machine(result['machine'])}. Hits do not depend on the machine, scheduler times do.",
        "",
        "Percent of the prompt tokens that came from the cache, by GiB of KV cache, with 32 "
        "requests in flight. `stock, unit 16` is vLLM's coordinator with `prefix_match_unit=16`, "
        "`fixed_point` and `hybrid_aware` have `prefix_match_unit=auto`. `shared prefixes` has "
        "`--prefix-match-unit 16` and `--enable-mamba-shared-prefix-checkpoint`, `all blocks` also "
        "`prefix_cache_retention_interval=None`. `sglang` and `marconi` are simulations.",
    ]
    for (part,), rows in split(result["rows"], "part").items():
        lines += ["", f"## {PARTS[part].title}", "", *_table(rows, result["shareable"])]
    if result["overhead"]:
        lines += ["", f"## {PARTS['overhead'].title}", "", *_overhead(result)]
    return "\n".join([*lines, "", "## Never below stock", "", *_comparisons(result["rows"])]) + "\n"


def _table(rows: Sequence[Row], shareable: Mapping[str, float]) -> Iterator[str]:
    """Yield a table per trace: a row per model, dtype and strategy, a column per memory size."""
    for trace, requests in split(rows, "trace", "requests"):
        yield (
            f"{trace.capitalize()}: {requests:,} requests. Tokens in whole blocks of 512 that an "
            f"earlier request had: {shareable[f'{trace} {requests}']:.1%}."
        )
        yield ""
    sizes = sorted({row["memory"] for row in rows})
    names = ("trace", "model", "dtype")
    lines = []
    for key, some in split(rows, *names).items():
        blocks = sorted({row["block_tokens"] for row in some if "block_tokens" in row})
        for (strategy,), line in split(some, "strategy").items():
            cells = {row["memory"]: rate(row) for row in line}
            rates = (cells.get(size, "") for size in sizes)
            lines.append([*key, ", ".join(map(str, blocks)), strategy, *rates])
    columns = [*names, "block, tokens", "strategy", *(f"{size:g}" for size in sizes)]
    yield from table(columns, lines)


def _overhead(result: Mapping[str, Any]) -> Iterator[str]:
    rows = {row["strategy"]: row for row in result["overhead"]}
    stock = rows[STOCK]
    yield (
        f"`schedule` and `update_from_output`, {stock['requests']:,} requests of "
        f"{stock['trace']}, {stock['model']}, {stock['dtype']}, {stock['memory']:g} GiB; "
        f"{len(stock['rounds_ms'])} rounds in one process, the median of each step over the "
        f"rounds. Load average {result['load']:.1f} at the start."
    )
    yield ""
    columns = [
        *("strategy", "ms per step", "ms per request", "steps", "per step, relative to stock"),
        *("per request, relative to stock", "per request, by round"),
    ]
    lines = []
    for strategy, row in rows.items():
        ratios = [a / b for a, b in zip(row["rounds_ms"], stock["rounds_ms"], strict=True)]
        times = (f"{row['step_ms']:.3f}", f"{row['request_ms']:.2f}", f"{row['steps']:,}")
        relative = (f"{row[name] / stock[name]:.3f}" for name in ("step_ms", "request_ms"))
        lines.append([strategy, *times, *relative, f"{min(ratios):.3f} to {max(ratios):.3f}"])
    yield from table(columns, lines)
    ratio = rows[HYBRID_AWARE]["request_ms"] / rows[STOCK_16]["request_ms"]
    yield ""
    yield f"Per request, relative to stock with the same match unit: {ratio:.3f}."


def comparisons(rows: Iterable[Row], reference: str = STOCK) -> list[tuple[Row, Row]]:
    """Pair our rows with the reference's row of the same case, if at least one of the two fits."""
    pairs = []
    for some in split(rows, "model", "dtype", "trace", "requests", "memory").values():
        by_strategy = {row["strategy"]: row for row in some}
        stock = by_strategy.get(reference)
        for name in (FIXED_POINT, HYBRID_AWARE):
            ours = by_strategy.get(name)
            if ours and stock and (ours["fits"] or stock["fits"]):
                pairs.append((ours, stock))
    return pairs


def faults(rows: Iterable[Row]) -> list[str]:
    """List the runs that fail the benchmark.

    `hybrid_aware` may not hit less than stock. Attention-only models must hit the same as stock.
    """
    return [
        f"{describe(ours)}: {rate(ours)}, {stock['strategy']} {rate(stock)}"
        for ours, stock in comparisons(rows)
        if (ours["strategy"] == HYBRID_AWARE and ours["hit_tokens"] < stock["hit_tokens"])
        or (ours["model"] == ATTENTION_ONLY and ours.get("hits_digest") != stock.get("hits_digest"))
    ]


def _comparisons(rows: Sequence[Row]) -> Iterator[str]:
    """List our runs that hit fewer tokens than `STOCK`, then those with fewer than `STOCK_16`."""
    for reference in (STOCK, STOCK_16):
        pairs = comparisons(rows, reference)
        below = [pair for pair in pairs if pair[0]["hit_tokens"] < pair[1]["hit_tokens"]]
        yield f"Compared with {reference}: {len(below)} of {len(pairs)} runs hit fewer tokens."
        yield ""
        for ours, stock in below:
            yield f"- {describe(ours)}: {rate(ours)}, {reference} {rate(stock)}"
        if below:
            yield ""
    alike = [pair for pair in comparisons(rows) if pair[0]["model"] == ATTENTION_ONLY]
    same = [pair for pair in alike if len({row.get("hits_digest") for row in pair}) == 1]
    runs = f"{len(same)} of {len(alike)} runs"
    yield f"{ATTENTION_ONLY}: {runs} have the hits of stock in every request."


def describe(row: Row) -> str:
    return (
        f"{row['model']}, {row['dtype']}, {row['requests']:,} requests of {row['trace']}, "
        f"{row['memory']:g} GiB, {row['strategy']}"
    )


def rate(row: Row) -> str:
    return f"{row['hit_rate']:.2%}" if row["fits"] else "does not fit"


def split(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by the values of the named fields."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def draw(path: Path, rows: Iterable[Row]) -> None:
    """Draw hit rates by memory to a PNG file, with a panel per part, model and trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = split([row for row in rows if row["fits"]], "part", "model", "trace", "requests")
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 3.7 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    markers = dict(zip(STRATEGIES, "s+^oxvd*", strict=True))
    for axes, ((_, model, trace, requests), some) in zip(grid.flat, panels.items(), strict=False):
        for (dtype, strategy), line in split(some, "dtype", "strategy").items():
            axes.plot(
                [row["memory"] for row in line],
                [100 * row["hit_rate"] for row in line],
                # Different markers keep overlapping lines distinguishable.
                marker=markers[strategy],
                markerfacecolor="none",
                label=f"{dtype}, {strategy}",
            )
        sizes = sorted({row["memory"] for row in some})
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.minorticks_off()
        axes.set_title(f"{trace}, {requests:,} requests\n{model}", fontsize=9)
        axes.set_xlabel("KV cache, GiB", fontsize=8)
        axes.set_ylabel("prompt tokens from the cache, %", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    pyplot.close(figure)
