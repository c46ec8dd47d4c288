# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.prefix_cache`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.prefix_cache.cases import PARTS, PUBLIC, SHAPES, Case, cases_of, requests_of
from benchmarks.prefix_cache.report import describe, draw, faults, markdown, rate
from benchmarks.prefix_cache.runs import measure_overhead, processes, sweep
from testing.machine import host
from vllm_hybrid_kv.tools.replay.trace import TraceError, shareable_tokens

NAME = "prefix_cache"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefix_cache",
        description="Measure prefix cache hits by memory, strategy, model and traffic.",
    )
    add = parser.add_argument
    models = sorted(path.name for path in SHAPES.iterdir())
    add("--trace", type=Path, help="the public trace; without it, only synthetic traces")
    add("--out", type=Path, default=Path(__file__).parents[1] / "results", help="result folder")
    add("--jobs", type=int, default=1, help="processes at a time")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    add("--models", nargs="+", choices=models, default=models, help="only these models")
    add("--requests", type=int, help="requests of each trace, by default the part's number")
    add("--skip", type=int, default=0, help="do not count the hits of this many first requests")
    add("--gib", type=float, nargs="+", help="sizes of the KV cache, by default the part's")
    add("--rounds", type=int, default=5, help="rounds of the part overhead")
    return parser.parse_args(arguments)


def selected(options: argparse.Namespace) -> list[Case]:
    cases = []
    for name in options.parts:
        part = PARTS[name]
        part = replace(
            part,
            requests=options.requests or part.requests,
            memory=options.gib or part.memory,
            models=[model for model in part.models if model in options.models],
        )
        cases += cases_of(name, part)
    return [case for case in cases if options.trace or case.trace != PUBLIC]


def run(options: argparse.Namespace) -> dict[str, Any]:
    cases = selected(options)
    result: dict[str, Any] = {"machine": host(), "rows": [], "shareable": {}, "overhead": []}
    for case in cases:
        key = f"{case.trace} {case.requests}"
        if key not in result["shareable"]:
            requests = requests_of(case.trace, case.requests, options.trace)
            tokens = sum(request.input_length for request in requests)
            result["shareable"][key] = shareable_tokens(requests) / tokens
    timed = [case for case in cases if case.part == "overhead"]
    replayed = [case for case in cases if case.part != "overhead"]
    for row in sweep(replayed, options.trace, options.jobs, options.skip):
        result["rows"].append(row)
        say(f"[{len(result['rows'])}/{len(replayed)}] {describe(row)}: {rate(row)}")
    if timed:
        # Time the strategies with one size of memory only.
        timed = [case for case in timed if case.memory == timed[0].memory]
        result["load"] = os.getloadavg()[0]
        with processes(1) as pool:
            timing = pool.submit(measure_overhead, timed, options.trace, options.rounds)
            result["overhead"] = timing.result()
    return result


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    """Measure, write the results, and return 1 if hits are worse than stock's."""
    options = parse()
    if options.trace:
        options.trace = options.trace.resolve()
    try:
        result = run(options)
    except (BrokenProcessPool, TraceError, OSError, ValueError) as error:
        say(f"python -m benchmarks.prefix_cache: {error}")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{NAME}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (options.out / f"{NAME}.md").write_text(text)
    draw(options.out / f"{NAME}.png", result["rows"])
    say(text)
    found = faults(result["rows"])
    for fault in found:
        say(f"worse than stock: {fault}")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
