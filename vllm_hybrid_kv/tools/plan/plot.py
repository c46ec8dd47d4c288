# SPDX-License-Identifier: Apache-2.0
"""Draw a plan: the pages of one block, and the tokens that fit into each size of memory."""

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

POINTS = 60


def draw(path: Path, result: PlanResult) -> None:
    """Draw one block of the plan and, for each cache dtype, how many tokens fit into memory."""
    plan = result.plan
    with figure(path, 1, 2, figsize=(13, 5), width_ratios=(1.15, 1)) as (drawn, (left, right)):
        drawn.suptitle(
            f"{result.architecture}: KV cache of {plan.blocks:,} blocks in "
            f"{format_size(plan.memory)}"
        )
        _draw_block(left, plan)
        _draw_capacity(right, result)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)


def _draw_block(axes: Any, plan: Plan) -> None:
    """Draw a bar for each kind of group: its layers' pages and their padding."""
    from matplotlib.patches import Patch

    from vllm_hybrid_kv.tools.plan.kv_cache_plan import merge_equal

    colours: dict[tuple[str, str], str] = {}
    bars: dict[str, list[Pages]] = {}
    for pages, groups in merge_equal(plan.pages):
        bars.setdefault(f"group {ranges(groups)}", []).append(pages)
        colour = KIND_COLOURS[len(colours) % len(KIND_COLOURS)]
        colours.setdefault((pages.kind, pages.stores), colour)
    for y, rows in enumerate(bars.values()):
        end = 0.0
        for pages in rows:
            page, padding = pages.page_bytes / MIB, pages.padding_bytes / MIB
            starts = [end + i * page for i in range(len(pages.layers))]
            end += page * len(pages.layers)
            colour = colours[pages.kind, pages.stores]
            contents = [(start, page - padding) for start in starts]
            axes.broken_barh(contents, (y - 0.3, 0.6), facecolor=colour, edgecolor="white")
            paddings = [(start + page - padding, padding) for start in starts]
            axes.broken_barh(paddings, (y - 0.3, 0.6), **PADDING)
        text = f" {rows[0].block_tokens:,} tokens, {100 * rows[0].padding:.2f} % padding"
        axes.text(0, y - 0.38, text, fontsize=9)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(len(bars) - 0.4, -0.75)
    axes.set_xlim(0, plan.block_bytes / MIB)
    axes.set_xlabel("MiB of one block; each part is a layer's page")
    axes.set_title(f"One block: {plan.kv_cache_dtype}, {plan.unify_page_sizes}", fontsize=11)
    legend = [
        Patch(color=colour, label=": ".join(filter(None, kind))) for kind, colour in colours.items()
    ]
    legend.append(Patch(**PADDING, label="padding"))
    axes.legend(
        handles=legend, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False
    )


def _draw_capacity(axes: Any, result: PlanResult) -> None:
    """Plot the tokens that fit (in requests of `max_model_len`) over memory, for each dtype."""
    from matplotlib.ticker import EngFormatter

    plan = result.plan
    sizes = [2 * plan.memory * (i + 1) // POINTS for i in range(POINTS)]
    for i, column in enumerate(result.dtypes):
        if column.plan is None:
            continue
        tokens = [column.plan.tokens_in(size) for size in sizes]
        label = f"{column.name}: {column.plan.capacity.max_len_tokens:,}"
        colour = DTYPE_COLOURS[i % len(DTYPE_COLOURS)]
        axes.plot([size / GIB for size in sizes], tokens, color=colour, label=label, linewidth=2)
    axes.axvline(plan.memory / GIB, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 2 * plan.memory / GIB)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="GiB of KV cache", ylabel="tokens that fit")
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.set_title(f"In requests of {plan.capacity.max_model_len:,} tokens", fontsize=11)
    axes.grid(alpha=0.3)
    title = f"tokens in {format_size(plan.memory)}"
    axes.legend(loc="upper left", frameon=False, title=title, alignment="left")
