# SPDX-License-Identifier: Apache-2.0
"""Draws a plan: the pages of one block, and the tokens that fit by memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.tools.output import figure, format_size
from vllm_hybrid_kv.tools.plan.report import PlanResult, ranges

if TYPE_CHECKING:
    from vllm_hybrid_kv.tools.plan.kv_cache_plan import Pages, Plan

MIB = 1 << 20
GIB = 1 << 30

KIND_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
"""Colours of kinds of layers, safe for colour-blind readers (Paul Tol)."""

DTYPE_COLOURS = ("#555555", "#ee7733", "#009988", "#332288", "#882255")
"""Colours of cache dtypes, different from those of kinds."""

PADDING: dict[str, Any] = {"facecolor": "#dddddd", "hatch": "////", "edgecolor": "white"}
BAR = {"height": 0.6, "linewidth": 0.4}

MOST_BARS = 12
POINTS = 60


def draw(path: Path, result: PlanResult) -> None:
    """Draw one block of the plan into a file, and the tokens by memory for each cache dtype."""
    plan = result.planned.plan
    with figure(path, 1, 2, figsize=(13, 5), width_ratios=(1.15, 1)) as (drawn, (left, right)):
        drawn.suptitle(
            f"{result.architecture}: KV cache of {plan.blocks:,} blocks in "
            f"{format_size(plan.memory)}"
        )
        _draw_block(left, plan)
        _draw_capacity(right, result)


def _draw_block(axes: Any, plan: Plan) -> None:
    """Draw a bar for each kind of group with its layers' pages, their padding and unused space."""
    from matplotlib.patches import Patch

    from vllm_hybrid_kv.tools.plan.kv_cache_plan import merge_equal

    kinds = list(dict.fromkeys((pages.kind, pages.stores) for pages in plan.pages))
    colour = {kind: KIND_COLOURS[i % len(KIND_COLOURS)] for i, kind in enumerate(kinds)}
    bars: dict[str, list[Pages]] = {}
    for pages, groups in merge_equal(plan.pages):
        name = f"group {ranges(groups)}" if len(groups) == 1 else f"groups {ranges(groups)}"
        bars.setdefault(name, []).append(pages)
    shown = list(bars.items())[:MOST_BARS]
    padded = False
    for y, (_, rows) in enumerate(shown):
        end = 0.0
        for row in rows:
            content = (row.page_bytes - row.padding_bytes) / MIB
            padding = row.padding_bytes / MIB
            for _ in row.layers:
                axes.barh(
                    y,
                    content,
                    left=end,
                    color=colour[row.kind, row.stores],
                    edgecolor="white",
                    **BAR,
                )
                axes.barh(y, padding, left=end + content, **PADDING, **BAR)
                end += content + padding
            padded |= row.padding_bytes > 0
        if (rest := plan.block_bytes / MIB - end) > 0:
            unused = axes.barh(y, rest, left=end, height=0.6, color="none")
            unused[0].set(edgecolor="#999999", linestyle=":")
            axes.text(end + rest / 2, y, "no layer", ha="center", va="center", color="#777777")
        share = max(row.padding for row in rows)
        blocks = " and ".join(sorted({f"{row.block_tokens:,}" for row in rows}))
        axes.text(0, y - 0.38, f" {blocks} tokens, {100 * share:.2f} % padding", fontsize=9)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.75)
    axes.set_xlim(0, plan.block_bytes / MIB)
    axes.set_xlabel("MiB of one block; each part is a layer's page")
    axes.set_title(f"One block: {plan.kv_cache_dtype}, {plan.unify_page_sizes}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    legend = [
        Patch(color=colour[kind], label=f"{kind[0]}: {kind[1]}" if kind[1] else kind[0])
        for kind in kinds
    ]
    if padded:
        legend.append(Patch(**PADDING, label="padding"))
    axes.legend(
        handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False
    )


def _draw_capacity(axes: Any, result: PlanResult) -> None:
    """Draw tokens in requests of `max_model_len` by memory, from the first that fits."""
    memory = result.planned.plan.memory
    sizes = [2 * memory * (i + 1) // POINTS for i in range(POINTS)]
    for i, column in enumerate(result.dtypes):
        if column.planned is None:
            continue
        points = [(size, column.planned.tokens_in(size)) for size in sizes]
        fitting = [(size / GIB, tokens) for size, tokens in points if tokens is not None]
        tokens = column.planned.plan.capacity.max_len_tokens
        colour = DTYPE_COLOURS[i % len(DTYPE_COLOURS)]
        label = f"{column.name}: {tokens:,}"
        axes.plot(*zip(*fitting, strict=True), color=colour, label=label, linewidth=2)
        axes.plot(memory / GIB, tokens, "o", color=colour)
    axes.axvline(memory / GIB, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 2 * memory / GIB)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GiB of KV cache")
    axes.set_ylabel("tokens that fit")
    axes.yaxis.set_major_formatter(lambda value, _: _thousands(value))
    max_model_len = result.planned.plan.capacity.max_model_len
    axes.set_title(f"In requests of {max_model_len:,} tokens", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    title = f"tokens in {format_size(memory)}"
    axes.legend(loc="upper left", frameon=False, title=title, alignment="left")


def _thousands(value: float) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k"
