# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.prefix_cache`; the package says what it does."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.prefix_cache.cases import (
    BY_MODEL,
    CONTROL,
    CONTROLS,
    DTYPES,
    FIXED_POINT,
    HYBRID_AWARE,
    MADE,
    MAIN_DTYPE,
    MAIN_MODEL,
    MEMORY,
    MODELS,
    OVERHEAD,
    PARTS,
    PUBLIC,
    SHAPES,
    STOCK,
    STOCK_16,
    STRATEGIES,
    TRAFFIC,
    Grid,
    Sources,
)
from benchmarks.prefix_cache.earlier import earlier, repeat
from benchmarks.prefix_cache.findings import MAIN_REQUESTS, goals
from benchmarks.prefix_cache.overhead import Timing
from benchmarks.prefix_cache.plot import draw
from benchmarks.prefix_cache.processes import ROOT, ChildError, answers
from benchmarks.prefix_cache.report import markdown
from benchmarks.prefix_cache.runs import JOURNAL, Journal, SourcesChangedError, sweep, trace_key
from benchmarks.prefix_cache.worker import sources_fingerprint
from testing.machine import host
from vllm_hybrid_kv.tools.replay.trace import TraceError, shareable_tokens

NAME = "prefix_cache"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix_cache",
        description="What does a prefix cache hit, by memory, strategy, model and traffic?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--trace", type=Path, help="the public trace; without it, those that are made here")
    add("--out", type=Path, default=Path(__file__).parents[1] / "results", help="for the results")
    add("--cache", type=Path, default=ROOT / ".cache" / NAME, help="for the runs that are done")
    add("--jobs", type=int, default=1, help="processes at a time")
    add("--resume", action="store_true", help="do not repeat what was run on the same sources")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay as they are")
    add(
        "--carry",
        type=int,
        default=0,
        help="keep runs of other sources if so many of each strategy's hit the same when repeated",
    )
    models = sorted(path.name for path in SHAPES.iterdir())

    def grid(part: str, requests: int, *memory: float) -> None:
        add(f"--{part}-requests", type=int, default=requests, help="of the trace")
        add(f"--{part}-gib", type=float, nargs="+", default=memory, help="sizes of the KV cache")

    grid(MEMORY, MAIN_REQUESTS, 4, 20, 80, 200, 400)
    grid(BY_MODEL, 300, 4, 20, 80, 400)
    add("--models", nargs="+", choices=models, default=MODELS, help=f"of the part {BY_MODEL}")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help=f"of the part {BY_MODEL}")
    grid(CONTROL, 200, 4, 20, 80, 400)
    add("--controls", nargs="+", choices=models, default=CONTROLS, help=f"of the part {CONTROL}")
    grid(TRAFFIC, 600, 4, 8, 20, 40)
    add("--overhead-requests", type=int, default=300, help="of the trace")
    add("--overhead-gib", type=float, default=20, help="size of the KV cache")
    add("--overhead-rounds", type=int, default=5, help="turns of each strategy")
    return parser.parse_args(arguments)


def grids(options: argparse.Namespace) -> list[Grid]:
    """Return what is swept."""
    public = [PUBLIC] if options.trace else []
    every = {
        MEMORY: Grid(
            MEMORY,
            [MAIN_MODEL],
            [MAIN_DTYPE],
            public,
            options.memory_requests,
            options.memory_gib,
            list(STRATEGIES),
        ),
        BY_MODEL: Grid(
            BY_MODEL,
            options.models,
            options.dtypes,
            public or ["agents"],
            options.models_requests,
            options.models_gib,
            [STOCK, HYBRID_AWARE],
        ),
        CONTROL: Grid(
            CONTROL,
            options.controls,
            ["auto"],
            public or ["agents"],
            options.control_requests,
            options.control_gib,
            [STOCK, FIXED_POINT, HYBRID_AWARE],
        ),
        TRAFFIC: Grid(
            TRAFFIC,
            [MAIN_MODEL],
            [MAIN_DTYPE],
            list(MADE),
            options.made_requests,
            options.made_gib,
            [STOCK, STOCK_16, HYBRID_AWARE],
        ),
    }
    return [every[part] for part in PARTS if part in options.parts and part in every]


def measure_overhead(options: argparse.Namespace) -> dict[str, Any]:
    """Time the strategies' turns in one process, with nothing of ours beside it."""
    timing = Timing(
        MAIN_MODEL,
        MAIN_DTYPE,
        PUBLIC if options.trace else "agents",
        str(options.trace.resolve()) if options.trace else None,
        options.overhead_requests,
        options.overhead_gib,
        options.overhead_rounds,
    )
    found: dict[str, Any] = {
        "model": timing.model,
        "kv_cache_dtype": timing.kv_cache_dtype,
        "trace": timing.trace,
        "requests": timing.requests,
        "memory": timing.memory,
        "rounds": timing.rounds,
        "load": os.getloadavg()[0],
        "rows": [],
        "medians": [],
    }
    log = options.cache / "overhead.txt"
    for turn in answers("benchmarks.prefix_cache.overhead", timing.to_json(), log):
        which = f"round {turn['round']}" if "round" in turn else "medians"
        say(
            f"{which}, {turn['strategy']}: {turn['step_ms']:.3f} ms a step, "
            f"{turn['request_ms']:.2f} ms a request"
        )
        found["rows" if "round" in turn else "medians"].append(turn)
    return found


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Measure, write, and return 1 if a goal is missed."""
    options = parse()
    sources = Sources(options.trace)
    code = sources_fingerprint()
    result: dict[str, Any] = {
        "machine": host(),
        "sources": code,
        **earlier(options.out / f"{NAME}.json", code, options.parts),
    }
    journal = Journal(options.cache / JOURNAL)
    swept = grids(options)
    cases = [case for grid in swept for case in grid.cases()]
    try:
        if "of" in result:
            repeat(result, options.carry, sources, journal, options.jobs, say)
        for key, case in {trace_key(case): case for case in cases}.items():
            requests = sources.requests(case.trace, case.requests)
            tokens = sum(request.input_length for request in requests)
            result["traces"][key] = {
                "prompt_tokens": tokens,
                "shareable": shareable_tokens(requests) / tokens,
            }
        rows = sweep(cases, sources, journal, options.jobs, options.resume, say)
        for grid in swept:
            found = [row for row in rows if row["part"] == grid.part]
            if found:
                result["parts"][grid.part] = {"rows": found}
        if OVERHEAD in options.parts:
            result["parts"][OVERHEAD] = measure_overhead(options)
    except (ChildError, SourcesChangedError, TraceError, OSError, ValueError) as error:
        say(f"python -m benchmarks.prefix_cache: {error}")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (options.out / f"{NAME}.md").write_text(text)
    draw(options.out / f"{NAME}.png", result)
    say(text)
    missed = [goal for goal in goals(result) if goal.met is False]
    for goal in missed:
        say(f"goal missed: {goal.what}: {goal.measured}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
