# SPDX-License-Identifier: Apache-2.0
"""What an earlier result says of the sources that are measured now."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.prefix_cache.cases import OVERHEAD, PUBLIC, Sources
from benchmarks.prefix_cache.findings import runs, setting_of
from benchmarks.prefix_cache.runs import Journal, case_of, sweep

Row = Mapping[str, Any]


def earlier(file: Path, sources: str, parts: Iterable[str]) -> dict[str, Any]:
    """Return what a result file has of parts that are not measured now.

    Args:
        file: It need not be there.
        sources: The fingerprint of the code that is measured.
        parts: Those that are measured.

    Returns:
        Its `parts` and `traces`, and `of` where they were measured with other sources: the
        fingerprint of those.
    """
    if not file.exists():
        return {"parts": {}, "traces": {}}
    found = json.loads(file.read_text())
    kept = {name: part for name, part in found["parts"].items() if name not in parts}
    result = {"parts": kept, "traces": found["traces"]}
    if found["sources"] != sources:
        result["of"] = found["sources"]
    elif "carried" in found and any(name != OVERHEAD for name in kept):
        result["carried"] = found["carried"]
    return result


def repeat(
    result: dict[str, Any],
    count: int,
    sources: Sources,
    journal: Journal,
    jobs: int,
    say: Callable[[str], None],
) -> None:
    """Keep runs of other sources if some of them hit the same now, request by request.

    Args:
        result: Of `earlier`, with runs of other sources. What cannot be kept is taken out: the
            times, and all runs if one of those repeated hits anything else.
        count: Of each strategy's runs so many are repeated, drawn at random.
        sources: Where the requests come from.
        journal: Takes the runs.
        jobs: Processes at a time.
        say: Is told what came of it.
    """
    old = result.pop("of")
    result["parts"].pop(OVERHEAD, None)
    draw = random.Random(old)
    # What needs a trace that is not given cannot be repeated, and is no evidence.
    rows = [
        row
        for row in runs(result)
        if row["fits"] and (row["trace"] != PUBLIC or sources.public is not None)
    ]
    chosen: list[Row] = []
    for strategy in sorted({row["strategy"] for row in rows}):
        some = [row for row in rows if row["strategy"] == strategy]
        chosen += draw.sample(some, min(count, len(some)))
    again = sweep([case_of(dict(row)) for row in chosen], sources, journal, jobs, True, say)
    for before, now in zip(chosen, again, strict=True):
        if not now["fits"] or before["hits_digest"] != now["hits_digest"]:
            say(f"{setting_of(before)}, {before['strategy']}: hits are others than with {old}")
            chosen = []
            break
    if not chosen:
        say("the earlier result is of other sources and is written anew")
        result["parts"].clear()
        result["traces"].clear()
        return
    result["carried"] = {
        "sources": old,
        "runs": len(runs(result)),
        "repeated": [f"{setting_of(row)}: {row['strategy']}" for row in chosen],
    }
