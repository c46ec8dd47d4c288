# SPDX-License-Identifier: Apache-2.0
"""The report: JSON with every number, Markdown to read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.engine.results import Check, Results, Speed, Verdict
from benchmarks.engine.speed import OURS

NOT_COMPARED = (Verdict.FAILED, Verdict.CANNOT, Verdict.LEFT_OUT)


def write(results: Results, machine: dict[str, Any], folder: Path) -> None:
    """Write `engine.json` and `engine.md`."""
    found = {
        "machine": machine,
        "failures": [asdict(row) for row in results.failures],
        "checks": [asdict(check) for check in results.checks],
        "engines": results.engines,
        "speeds": [
            {
                **asdict(speed),
                "tokens_per_s": {cache: speed.tokens_per_s(cache) for cache in speed.milliseconds},
                "times_faster": ratios(speed),
            }
            for speed in results.speeds
        ],
        "not_measured": [asdict(gap) for gap in results.gaps],
    }
    (folder / "engine.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "engine.md").write_text(markdown(results, machine))


def ratios(speed: Speed) -> dict[str, float]:
    """Return how many times faster ours is than each other cache; nothing where ours is missing."""
    if OURS not in speed.milliseconds:
        return {}
    others = [cache for cache in speed.milliseconds if cache != OURS]
    return {cache: speed.times_faster(OURS, cache) for cache in others}


def markdown(results: Results, machine: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        "# Real engines with k8v4 caches",
        "",
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "",
        *_summary(results),
    ]
    if results.checks:
        lines += ["", "## Equal outputs", "", *_checks(results.checks)]
    if results.speeds or results.gaps:
        lines += ["", "## Decode speed", "", *_speeds(results, machine)]
    return "\n".join(lines) + "\n"


def _summary(results: Results) -> list[str]:
    compared = [check for check in results.checks if check.tokens]
    different = sum(check.verdict is Verdict.DIFFERENT for check in compared)
    lines = []
    if results.checks:
        prompts = sum(check.prompts for check in compared)
        tokens = sum(check.tokens for check in compared)
        lines.append(
            f"{len(compared)} comparisons of {prompts} outputs, {tokens} tokens: "
            + (f"{different} DIFFERENT." if different else "all equal.")
        )
    if results.speeds:
        lines.append(f"{len(results.speeds)} batches timed.")
    failed = sum(row.verdict is Verdict.FAILED for row in results.failures)
    if failed:
        lines.append(f"{failed} times an engine of ours FAILED.")
    return [" ".join(lines) or "Nothing was run."]


def _checks(checks: list[Check]) -> list[str]:
    compared = [check for check in checks if check.verdict not in NOT_COMPARED]
    others = [check for check in checks if check.verdict in NOT_COMPARED]
    lines = []
    if compared:
        lines += [
            "Each engine against an eager one of the same model with a k8v4 cache, which computed "
            "each prompt alone and from its first token on. Tokens that were ahead of the second "
            "best by more than rounding have to be equal; up to the first close choice they are "
            "compared. `apart`: the largest difference of a log-probability, and beside an "
            "unquantised cache the mean.",
            "",
            "| model | engine | | outputs | tokens | apart | | |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for check in compared:
        apart = "" if check.apart is None else f"{check.apart:.3f}"
        cells = (check.model, check.configuration, check.check, check.prompts or "")
        lines.append(_row(*cells, check.tokens or "", apart, check.verdict.value, check.detail))
    if others:
        lines += ["", "Not compared:", "", "| model | engine | | why |", "|---|---|---|---|"]
    for check in others:
        what = f"{check.configuration}: {check.check}" if check.check else check.configuration
        lines.append(_row(check.model, what, check.verdict.value, check.detail))
    return lines


def _speeds(results: Results, machine: dict[str, Any]) -> list[str]:
    lines = [
        "Milliseconds in which a request gets a token, and tokens per second of the batch: "
        "medians. The engines of a row ran in turn. In brackets: how many times faster k8v4 is, "
        "the median over rounds of one round's ratio. Random weights, and the scheduler in the "
        "engine's own process: compare within a row, not with a server.",
    ]
    if machine.get("vLLM's compiled extension") == "missing":
        lines += [
            "",
            "vLLM's compiled extension is not there. What stands in for it is slow, and the same "
            "for all caches: only the ratios mean something, and with it they are farther from 1.",
        ]
    caches = list(dict.fromkeys(cache for s in results.speeds for cache in s.milliseconds))
    if results.speeds:
        lines += [
            "",
            "| model | mode | batch, tokens | " + " | ".join(caches) + " |",
            "|---|---|---|" + "---|" * len(caches),
        ]
    for speed in results.speeds:
        times = ratios(speed)
        cells = []
        for cache in caches:
            if cache not in speed.milliseconds:
                cells.append("")
                continue
            ratio = f" ({times[cache]:.2f})" if cache in times else ""
            each = f"{speed.ms_per_token(cache):.3f} ms, {speed.tokens_per_s(cache):.0f}/s"
            cells.append(each + ratio)
        lines.append(_row(speed.model, speed.mode, f"{speed.batch}, {speed.length}", *cells))
    if results.gaps:
        lines += [
            "",
            "Not measured:",
            "",
            "| model | mode | batch, tokens | cache | | why |",
            "|---|---|---|---|---|---|",
        ]
    for gap in results.gaps:
        cell = f"{gap.cell[0]}, {gap.cell[1]}" if gap.cell else "all"
        why = (gap.verdict.value, gap.reason)
        lines.append(_row(gap.model, gap.mode, cell, gap.cache or "all", *why))
    backends = _backends(results)
    if backends:
        lines += ["", "Attention backends, by number of layers: " + "; ".join(backends) + "."]
    return lines


def _backends(results: Results) -> list[str]:
    """Return what each cache dtype ran on, once."""
    found: Counter[str] = Counter()
    for engine in results.engines:
        backends: Any = engine["backends"]
        layers = ", ".join(f"{count} {name}" for name, count in backends.items())
        found[f"{engine['model']}, {engine['cache_dtype']}: {layers}"] += 1
    return list(found)


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
