# SPDX-License-Identifier: Apache-2.0
"""Plots hit rates by memory, with a panel per model and per trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.prefix_cache.cases import (
    BY_MODEL,
    DTYPES,
    HYBRID_AWARE,
    MEMORY,
    STOCK,
    STRATEGIES,
    TRAFFIC,
)

Row = Mapping[str, Any]

COLUMNS = 3
COLOURS = dict(zip(STRATEGIES, ("#7f7f7f", "#c49c4a", "#4c78a8", "#d1495b"), strict=True))
# Different markers keep overlapping lines distinguishable.
MARKERS = dict(zip(STRATEGIES, ("s", "+", "^", "o"), strict=True))
DTYPE_COLOURS = dict(zip(DTYPES, ("#4c78a8", "#2a9d62", "#d1495b"), strict=True))


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Draw the parts of a result to a PNG file, if it has any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(result)
    if not panels:
        return
    lines = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, len(panels))
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(4.6 * columns, 3.7 * lines), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel(axes)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def _panels(result: Mapping[str, Any]) -> list[Callable[[Any], None]]:
    rows = {part: found["rows"] for part, found in result["parts"].items()}
    panels: list[Callable[[Any], None]] = []
    for part in (MEMORY, BY_MODEL, TRAFFIC):
        groups: dict[str, list[Row]] = {}
        for row in rows.get(part, []):
            groups.setdefault(row["model" if part == BY_MODEL else "trace"], []).append(row)
        for some in groups.values():
            if part == BY_MODEL:
                panels.append(partial(_by_dtype, rows=some))
            else:
                shared = result["traces"][f"{some[0]['trace']} {some[0]['requests']}"]["shareable"]
                panels.append(partial(_by_strategy, rows=some, shared=shared))
    return panels


def _by_strategy(axes: Any, rows: Sequence[Row], shared: float) -> None:
    for name in STRATEGIES:
        _line(axes, [row for row in rows if row["strategy"] == name], COLOURS[name], "-", name)
    axes.axhline(100 * shared, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        "tokens in whole blocks of 512 that an earlier request had",
        (0.02, 100 * shared),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        fontsize=7,
    )
    first = rows[0]
    _finish(
        axes,
        f"{first['trace']}, {first['requests']:,} requests\n"
        f"{first['model']}, {first['kv_cache_dtype']}",
        rows,
    )


def _by_dtype(axes: Any, rows: Sequence[Row]) -> None:
    for dtype in DTYPES:
        for strategy, style in ((STOCK, "--"), (HYBRID_AWARE, "-")):
            some = [
                row for row in rows if (row["kv_cache_dtype"], row["strategy"]) == (dtype, strategy)
            ]
            _line(axes, some, DTYPE_COLOURS[dtype], style, f"{dtype}, {strategy}")
    first = rows[0]
    _finish(axes, f"{first['trace']}, {first['requests']:,} requests\n{first['model']}", rows)


def _line(axes: Any, rows: Sequence[Row], colour: str, style: str, name: str) -> None:
    rows = sorted(rows, key=lambda row: row["memory"])
    if not rows:
        return
    fit = [row for row in rows if row["fits"]]
    axes.plot(
        [row["memory"] for row in fit],
        [100 * row["hit_rate"] for row in fit],
        color=colour,
        linestyle=style,
        marker=MARKERS[rows[0]["strategy"]],
        markersize=4.5,
        markerfacecolor="none",
        label=name,
    )


def _finish(axes: Any, title: str, rows: Sequence[Row]) -> None:
    sizes = sorted({row["memory"] for row in rows})
    small = sorted({row["memory"] for row in rows if not row["fits"]})
    if small:
        axes.plot(small, [0] * len(small), "x", color="black", clip_on=False, label="does not fit")
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("KV cache, GiB", fontsize=8)
    axes.set_ylabel("prompt tokens from the cache, %", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_ylim(0, 1.15 * max(axes.dataLim.y1, 0.1))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)
