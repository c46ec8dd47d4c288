# SPDX-License-Identifier: Apache-2.0
"""Writes a result as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.prefix_cache.cases import (
    BY_MODEL,
    CONTROL,
    HYBRID_AWARE,
    MEMORY,
    OVERHEAD,
    STOCK,
    STOCK_16,
    STRATEGIES,
    TRAFFIC,
)
from benchmarks.prefix_cache.findings import Goal, comparisons, goals, overhead, rate, runs

Row = Mapping[str, Any]


def markdown(result: Mapping[str, Any]) -> str:
    """Return a result as Markdown."""
    rows = {part: list(found["rows"]) for part, found in result["parts"].items()}
    where = result["machine"]
    lines = [
        "# Prefix cache hits in vLLM's scheduler, without a model",
        "",
        f"vLLM {where['vllm']}, Python {where['python']}; {where['cpu']}, {where['cpus']} CPUs. "
        "Hits do not depend on the machine, scheduler times do.",
        "",
        "Percent of the prompt tokens that came from the cache, with 32 requests in flight. "
        "`stock, unit 16` is vLLM's coordinator with `prefix_match_unit=16`, `fixed_point` and "
        "`hybrid_aware` have `prefix_match_unit=auto`.",
        "",
        *_other_sources(result),
        "## Goals",
        "",
        *_goals(goals(result)),
    ]
    sections: dict[str, Callable[[Sequence[Row], Mapping[str, Any]], Iterator[str]]] = {
        MEMORY: _by_memory,
        BY_MODEL: _by_model,
        CONTROL: _by_model,
        TRAFFIC: _by_memory,
        OVERHEAD: _overhead,
    }
    titles = {
        MEMORY: "The public trace, by memory",
        BY_MODEL: "Models and KV cache dtypes",
        CONTROL: "Models without states",
        TRAFFIC: "Synthetic traffic",
        OVERHEAD: "Time in the scheduler",
    }
    for part, section in sections.items():
        if rows.get(part):
            lines += ["", f"## {titles[part]}", "", *section(rows[part], result)]
    return "\n".join([*lines, "", "## Never below stock", "", *_below(runs(result))]) + "\n"


def _other_sources(result: Mapping[str, Any]) -> Iterator[str]:
    """Name the parts that were measured with other versions of the code."""
    for name, part in result["parts"].items():
        if part.get("sources") != result.get("sources"):
            yield f"The part `{name}` was measured with an earlier version of the code."
            yield ""


def _goals(found: Iterable[Goal]) -> Iterator[str]:
    yield from _head("goal", "measured", "")
    for goal in found:
        verdict = {True: "met", False: "**missed**", None: "not measured"}[goal.met]
        yield _line(goal.what, goal.measured, verdict)


def _by_memory(rows: Sequence[Row], result: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table per trace: a line per size of memory, a column per strategy."""
    for number, (trace, some) in enumerate(_split(rows, "trace").items()):
        if number:
            yield ""
        first = some[0]
        shared = result["traces"][f"{trace} {first['requests']}"]["shareable"]
        yield (
            f"{trace.capitalize()}: {first['requests']:,} requests, {first['model']}, "
            f"{first['kv_cache_dtype']}. Tokens in whole blocks of 512 that an earlier request "
            f"had: {shared:.1%}."
        )
        yield ""
        strategies = [name for name in STRATEGIES if name in _split(some, "strategy")]
        yield from _head("GiB", *strategies)
        for memory, line in _split(some, "memory").items():
            found = {row["strategy"]: row for row in line}
            yield _line(f"{memory:g}", *(_rate(found.get(name)) for name in strategies))


def _by_model(rows: Sequence[Row], result: Mapping[str, Any]) -> Iterator[str]:
    """Yield one table: a line per model, dtype and strategy, a column per size."""
    sizes = list(_split(rows, "memory"))
    first = rows[0]
    yield f"{first['trace'].capitalize()} trace, {first['requests']:,} requests, by GiB."
    yield ""
    yield from _head(
        "model", "dtype", "block, tokens", "strategy", *(f"{size:g}" for size in sizes)
    )
    for model, of_model in _split(rows, "model").items():
        for dtype, of_dtype in _split(of_model, "kv_cache_dtype").items():
            blocks = {row["block_tokens"] for row in of_dtype if row["fits"]}
            for strategy, line in _split(of_dtype, "strategy").items():
                found = {row["memory"]: row for row in line}
                cells = [_rate(found.get(size)) for size in sizes]
                block = ", ".join(str(tokens) for tokens in sorted(blocks))
                yield _line(model, dtype, block, strategy, *cells)


def _overhead(turns: Sequence[Row], result: Mapping[str, Any]) -> Iterator[str]:
    timing = result["parts"][OVERHEAD]
    medians = timing["medians"]
    yield (
        f"`schedule` and `update_from_output`, {timing['requests']:,} requests of "
        f"{timing['trace']}, {timing['model']}, {timing['kv_cache_dtype']}, "
        f"{timing['memory']:g} GiB; {timing['rounds']} rounds in one process, the median of each "
        f"step over the rounds. Load average {timing['load']:.1f} at the start."
    )
    yield ""
    yield from _head(
        "strategy",
        "ms per step",
        "ms per request",
        "steps",
        "per step, of stock",
        "per request, of stock",
        "per request, by round",
    )
    for row in medians:
        strategy = row["strategy"]
        ratios = [
            overhead(one, "request_ms", strategy, STOCK) for one in _split(turns, "round").values()
        ]
        yield _line(
            strategy,
            f"{row['step_ms']:.3f}",
            f"{row['request_ms']:.2f}",
            f"{row['steps']:,}",
            *(
                f"{overhead(medians, measure, strategy, STOCK):.3f}"
                for measure in ("step_ms", "request_ms")
            ),
            f"{min(ratios):.3f} to {max(ratios):.3f}",
        )
    ratio = overhead(medians, "request_ms", HYBRID_AWARE, STOCK_16)
    yield ""
    yield f"Per request, relative to stock with the same match unit: {ratio:.3f}."


def _below(rows: Sequence[Row]) -> Iterator[str]:
    """List the runs below stock, and those below stock with the finer match unit."""
    for number, reference in enumerate((STOCK, STOCK_16)):
        compared = comparisons(rows, reference)
        below = [pair for pair in compared if pair.below]
        if number:
            yield ""
        yield f"Compared with {reference}: {len(below)} of {len(compared)} runs hit fewer tokens."
        if below:
            yield ""
            yield from (f"- {pair}" for pair in below)


def _rate(row: Row | None) -> str:
    return "" if row is None else rate(row)


def _split(rows: Iterable[Row], name: str) -> dict[Any, list[Row]]:
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row[name], []).append(row)
    return found


def _head(*names: str) -> list[str]:
    return [_line(*names), "|" + "---|" * len(names)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
