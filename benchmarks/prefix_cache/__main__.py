# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.prefix_cache`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
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
    Case,
    grid,
    requests_of,
)
from benchmarks.prefix_cache.findings import MAIN_REQUESTS, goals
from benchmarks.prefix_cache.overhead import measure
from benchmarks.prefix_cache.plot import draw
from benchmarks.prefix_cache.report import markdown
from benchmarks.prefix_cache.runs import in_process, sources_fingerprint, sweep
from testing.machine import host
from vllm_hybrid_kv.tools.replay.trace import TraceError, shareable_tokens

NAME = "prefix_cache"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix_cache",
        description="Measure prefix cache hits by memory, strategy, model and traffic.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--trace", type=Path, help="the public trace; without it, only synthetic traces")
    add("--out", type=Path, default=Path(__file__).parents[1] / "results", help="result folder")
    add("--jobs", type=int, default=1, help="processes at a time")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="other parts keep their rows")
    models = sorted(path.name for path in SHAPES.iterdir())

    def sizes(part: str, requests: int, *memory: float) -> None:
        add(f"--{part}-requests", type=int, default=requests, help="requests of the trace")
        add(f"--{part}-gib", type=float, nargs="+", default=memory, help="sizes of the KV cache")

    sizes(MEMORY, MAIN_REQUESTS, 4, 20, 80, 200, 400)
    sizes(BY_MODEL, 300, 4, 20, 80, 400)
    add("--models", nargs="+", choices=models, default=MODELS, help=f"of the part {BY_MODEL}")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help=f"of the part {BY_MODEL}")
    sizes(CONTROL, 200, 4, 20, 80, 400)
    add("--controls", nargs="+", choices=models, default=CONTROLS, help=f"of the part {CONTROL}")
    sizes(TRAFFIC, 600, 4, 8, 20, 40)
    add("--overhead-requests", type=int, default=300, help="requests of the trace")
    add("--overhead-gib", type=float, default=20, help="size of the KV cache")
    add("--overhead-rounds", type=int, default=5, help="rounds of each strategy")
    return parser.parse_args(arguments)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return the cases of the selected parts."""
    main_model, main_dtype = [MAIN_MODEL], [MAIN_DTYPE]
    public = [PUBLIC] if options.trace else []
    any_trace = public or ["agents"]
    rows = (
        (MEMORY, main_model, main_dtype, public, STRATEGIES),
        (BY_MODEL, options.models, options.dtypes, any_trace, [STOCK, HYBRID_AWARE]),
        (CONTROL, options.controls, ["auto"], any_trace, [STOCK, FIXED_POINT, HYBRID_AWARE]),
        (TRAFFIC, main_model, main_dtype, list(MADE), [STOCK, STOCK_16, HYBRID_AWARE]),
    )
    return [
        case
        for part, models, dtypes, traces, strategies in rows
        if part in options.parts
        for case in grid(
            part,
            models,
            dtypes,
            traces,
            getattr(options, f"{part}_requests"),
            getattr(options, f"{part}_gib"),
            list(strategies),
        )
    ]


def measure_overhead(options: argparse.Namespace) -> dict[str, Any]:
    trace = PUBLIC if options.trace else "agents"
    requests, memory = options.overhead_requests, options.overhead_gib
    case = Case(OVERHEAD, MAIN_MODEL, MAIN_DTYPE, trace, requests, memory, STOCK)
    load = os.getloadavg()[0]
    found = in_process(measure, case, options.trace, options.overhead_rounds)
    for row in found["medians"]:
        print(f"{row['strategy']}: {row['step_ms']:.3f} ms a step, {row['request_ms']:.2f} ms")
    return {
        "model": MAIN_MODEL,
        "kv_cache_dtype": MAIN_DTYPE,
        "trace": trace,
        "requests": requests,
        "memory": memory,
        "rounds": options.overhead_rounds,
        "load": load,
        **found,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Return the result, with the earlier one's rows of parts that are not selected.

    Raises:
        RuntimeError: The package changed during the run.
    """
    sources = sources_fingerprint()
    file = options.out / f"{NAME}.json"
    earlier = json.loads(file.read_text()) if file.exists() else {"parts": {}, "traces": {}}
    result: dict[str, Any] = {
        "machine": host(),
        "sources": sources,
        "parts": {k: part for k, part in earlier["parts"].items() if k not in options.parts},
        "traces": earlier["traces"],
    }
    for part in result["parts"].values():
        part.setdefault("sources", earlier.get("sources"))
    cases = cases_of(options)
    for case in {case.trace_key: case for case in cases}.values():
        requests = requests_of(case.trace, case.requests, options.trace)
        tokens = sum(request.input_length for request in requests)
        result["traces"][case.trace_key] = {
            "prompt_tokens": tokens,
            "shareable": shareable_tokens(requests) / tokens,
        }
    for row in sweep(cases, options.trace, options.jobs, say):
        part = result["parts"].setdefault(row["part"], {"rows": [], "sources": sources})
        part["rows"].append(row)
    if OVERHEAD in options.parts:
        result["parts"][OVERHEAD] = {"sources": sources, **measure_overhead(options)}
    if sources_fingerprint() != sources:
        raise RuntimeError("the package changed during the run: start again")
    return result


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Measure, write the results, and return 1 if a goal is missed."""
    options = parse()
    if options.trace:
        options.trace = options.trace.resolve()
    try:
        result = run(options)
    except (BrokenProcessPool, RuntimeError, TraceError, OSError, ValueError) as error:
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
