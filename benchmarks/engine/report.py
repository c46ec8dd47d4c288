# SPDX-License-Identifier: Apache-2.0
"""The rows of the report, and the report: JSON with every number, Markdown to read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

OURS = "k8v4"


class Verdict(str, Enum):
    """The result of a row."""

    EQUAL = "equal"
    DIFFERENT = "DIFFERENT"
    FAILED = "FAILED"
    INCONCLUSIVE = "inconclusive"
    UNSUPPORTED = "unsupported by vLLM"
    SKIPPED = "skipped"


FAILURES = (Verdict.DIFFERENT, Verdict.FAILED)
NOT_COMPARED = (Verdict.FAILED, Verdict.UNSUPPORTED, Verdict.SKIPPED)


@dataclass(frozen=True)
class Check:
    """A comparison of an engine with the reference of its model, or the reason for its absence.

    Attributes:
        configuration: Name of the engine's configuration.
        check: What was compared; empty if nothing was.
        detail: The difference, or the reason.
        prompts: Number of prompts compared.
        tokens: Number of tokens compared.
        apart: Largest difference of a log-probability; compared with an unquantised cache, the
            mean.
    """

    model: str
    configuration: str
    check: str
    verdict: Verdict
    detail: str = ""
    prompts: int = 0
    tokens: int = 0
    apart: float | None = None

    def __str__(self) -> str:
        words = (self.model, self.configuration, self.check, self.verdict.value, self.detail)
        return ", ".join(filter(None, words))


@dataclass(frozen=True)
class Speed:
    """Decode times of the engines of one mode for one batch.

    Attributes:
        length: Tokens of each request's context.
        milliseconds: By cache and round, the time in which a request gets a token.
    """

    model: str
    mode: str
    batch: int
    length: int
    milliseconds: dict[str, list[float]]

    def ms_per_token(self, cache: str) -> float:
        """Return the median over rounds."""
        return statistics.median(self.milliseconds[cache])

    def tokens_per_s(self, cache: str) -> float:
        """Return the tokens that all requests together get in a second."""
        return 1e3 * self.batch / self.ms_per_token(cache)

    def times_faster(self) -> dict[str, float]:
        """Return by cache how many times faster ours is; empty if ours was not measured.

        The median of the ratios of each round, because a machine's speed changes over time.
        """
        ours = self.milliseconds.get(OURS)
        if ours is None:
            return {}
        return {
            cache: statistics.median(t / o for t, o in zip(times, ours, strict=True))
            for cache, times in self.milliseconds.items()
            if cache != OURS
        }


@dataclass(frozen=True)
class Gap:
    """A speed that was not measured.

    Attributes:
        cache: Name of the cache; empty for all.
        verdict: The kind of reason.
        cell: Batch size and context length; None for all.
    """

    model: str
    mode: str
    cache: str
    verdict: Verdict
    reason: str
    cell: tuple[int, int] | None = None

    def __str__(self) -> str:
        cell = "{} x {}".format(*self.cell) if self.cell else ""
        words = (self.model, self.mode, self.cache, cell, self.verdict.value, self.reason)
        return ", ".join(filter(None, words))


@dataclass
class Results:
    """All rows."""

    checks: list[Check] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)

    @property
    def failures(self) -> list[Check | Gap]:
        """The rows that make the command fail: unequal outputs and failures of our engines."""
        rows: list[Check | Gap] = [*self.checks, *self.gaps]
        return [row for row in rows if row.verdict in FAILURES]


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
                "times_faster": speed.times_faster(),
            }
            for speed in results.speeds
        ],
        "not_measured": [asdict(gap) for gap in results.gaps],
    }
    (folder / "engine.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "engine.md").write_text(markdown(results, machine))


def markdown(results: Results, machine: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    described = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = ["# Real engines with k8v4 caches", f"{described}.", _summary(results)]
    if results.checks:
        parts += ["## Equal outputs", *_checks(results.checks)]
    if results.speeds or results.gaps:
        parts += ["## Decode speed", *_speeds(results, machine)]
    return "\n\n".join(parts) + "\n"


def _summary(results: Results) -> str:
    compared = [check for check in results.checks if check.tokens]
    different = sum(check.verdict is Verdict.DIFFERENT for check in compared)
    sentences = []
    if results.checks:
        prompts = sum(check.prompts for check in compared)
        tokens = sum(check.tokens for check in compared)
        sentences.append(
            f"{len(compared)} comparisons of {prompts} outputs, {tokens} tokens: "
            + (f"{different} DIFFERENT." if different else "all equal.")
        )
    if results.speeds:
        sentences.append(f"{len(results.speeds)} batches timed.")
    failed = sum(row.verdict is Verdict.FAILED for row in results.failures)
    if failed:
        sentences.append(f"{failed} times an engine of ours FAILED.")
    return " ".join(sentences) or "Nothing was run."


def _checks(checks: list[Check]) -> list[str]:
    compared = [
        (
            *(c.model, c.configuration, c.check, c.prompts or "", c.tokens or ""),
            *("" if c.apart is None else f"{c.apart:.3f}", c.verdict.value, c.detail),
        )
        for c in checks
        if c.verdict not in NOT_COMPARED
    ]
    others = [
        (c.model, ": ".join(filter(None, (c.configuration, c.check))), c.verdict.value, c.detail)
        for c in checks
        if c.verdict in NOT_COMPARED
    ]
    parts = []
    if compared:
        parts += [
            "Each engine is compared with an eager engine of the same model with a k8v4 cache, "
            "which computed each prompt alone and from its first token on. Tokens before the "
            "first close choice (closer than rounding) must be equal. `apart`: the largest "
            "difference of a log-probability; compared with an unquantised cache, the mean.",
            _table(("model", "engine", "", "outputs", "tokens", "apart", "", ""), compared),
        ]
    if others:
        parts += ["Not compared:", _table(("model", "engine", "", "reason"), others)]
    return parts


def _speeds(results: Results, machine: dict[str, Any]) -> list[str]:
    parts = [
        "Milliseconds in which a request gets a token, and tokens per second of the batch: "
        "medians. The engines of a row ran in turn. In brackets: how many times faster k8v4 is, "
        "the median of the ratios of each round. Random weights, and the scheduler in the "
        "engine's own process: compare within a row, not with a server.",
    ]
    if machine.get("vLLM's compiled extension") == "missing":
        parts.append(
            "vLLM's compiled extension is missing. Its substitute is slow, and equally slow for "
            "all caches: only the ratios are meaningful, and the real ones are farther from 1."
        )
    caches = list(dict.fromkeys(cache for s in results.speeds for cache in s.milliseconds))
    if results.speeds:
        rows = [
            (s.model, s.mode, f"{s.batch}, {s.length}", *(_time(s, cache) for cache in caches))
            for s in results.speeds
        ]
        parts.append(_table(("model", "mode", "batch, tokens", *caches), rows))
    if results.gaps:
        gaps = [
            (
                *(gap.model, gap.mode, f"{gap.cell[0]}, {gap.cell[1]}" if gap.cell else "all"),
                *(gap.cache or "all", gap.verdict.value, gap.reason),
            )
            for gap in results.gaps
        ]
        heads = ("model", "mode", "batch, tokens", "cache", "", "reason")
        parts += ["Not measured:", _table(heads, gaps)]
    backends = dict.fromkeys(
        f"{engine['model']}, {engine['cache_dtype']}: "
        + ", ".join(f"{count} {name}" for name, count in engine["backends"].items())
        for engine in results.engines
    )
    if backends:
        parts.append("Attention backends, by number of layers: " + "; ".join(backends) + ".")
    return parts


def _time(speed: Speed, cache: str) -> str:
    if cache not in speed.milliseconds:
        return ""
    times = speed.times_faster()
    ratio = f" ({times[cache]:.2f})" if cache in times else ""
    return f"{speed.ms_per_token(cache):.3f} ms, {speed.tokens_per_s(cache):.0f}/s{ratio}"


def _table(heads: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )
