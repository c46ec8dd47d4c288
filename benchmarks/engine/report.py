# SPDX-License-Identifier: Apache-2.0
"""Write the report from its rows: JSON with every number, and Markdown tables."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks.markdown import table

OURS = "k8v4"


class Verdict(str, Enum):
    """The result of a row."""

    EQUAL = "equal"
    DIFFERENT = "DIFFERENT"
    FAILED = "FAILED"
    INCONCLUSIVE = "inconclusive"
    UNSUPPORTED = "unsupported by vLLM"
    SKIPPED = "skipped"


COMPARED = (Verdict.EQUAL, Verdict.DIFFERENT, Verdict.INCONCLUSIVE)
FAILURES = (Verdict.DIFFERENT, Verdict.FAILED)


@dataclass(frozen=True)
class Row:
    """The result of comparing an engine with its model's reference, or why it was not compared.

    Attributes:
        what: Which outputs were compared, or which batch was not timed. Empty if the row is about
            the whole engine.
        detail: How the outputs differ, or why they were not compared.
        outputs: How many outputs were compared. They have `tokens` tokens in total.
        apart: The largest difference of log-probabilities, or their mean difference if the
            reference is an unquantised cache.
    """

    model: str
    engine: str
    what: str
    verdict: Verdict
    detail: str = ""
    outputs: int = 0
    tokens: int = 0
    apart: float | None = None

    def __str__(self) -> str:
        words = (self.model, self.engine, self.what, self.verdict.value, self.detail)
        return ", ".join(filter(None, words))


@dataclass(frozen=True)
class Speed:
    """Decode times of one batch: milliseconds per token of a request, by cache and round."""

    model: str
    mode: str
    batch: int
    length: int
    milliseconds: dict[str, list[float]]

    def times_faster(self) -> dict[str, float]:
        """Return how many times faster k8v4 is than each other cache: the median of all rounds."""
        ours = self.milliseconds.get(OURS, [])
        return {
            cache: statistics.median(t / o for t, o in zip(times, ours, strict=True))
            for cache, times in self.milliseconds.items()
            if ours and cache != OURS
        }

    def cells(self) -> dict[str, str]:
        """Return a text for each cache: median time, tokens per second of the batch, and ratio."""
        ratios = {cache: f" ({ratio:.2f})" for cache, ratio in self.times_faster().items()}
        medians = {cache: statistics.median(times) for cache, times in self.milliseconds.items()}
        return {
            cache: f"{ms:.3f} ms, {1e3 * self.batch / ms:.0f}/s{ratios.get(cache, '')}"
            for cache, ms in medians.items()
        }


@dataclass
class Results:
    """The results of all models."""

    rows: list[Row] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)

    @property
    def failures(self) -> list[Row]:
        """The rows that make the command fail: unequal outputs and failures of our engines."""
        return [row for row in self.rows if row.verdict in FAILURES]


def write(results: Results, machine: dict[str, Any], folder: Path) -> None:
    found = {
        "machine": machine,
        **asdict(results),
        "speeds": [{**asdict(s), "times_faster": s.times_faster()} for s in results.speeds],
    }
    (folder / "engine.json").write_text(json.dumps(found, indent=2) + "\n")
    (folder / "engine.md").write_text(markdown(results, machine))


def markdown(results: Results, machine: dict[str, Any]) -> str:
    compared = [row for row in results.rows if row.verdict in COMPARED]
    others = [row for row in results.rows if row.verdict not in COMPARED]
    different, failed = (sum(r.verdict is v for r in results.failures) for v in FAILURES)
    parts = [
        "# Real engines with k8v4 caches",
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        f"{len(compared)} comparisons of {sum(row.outputs for row in compared)} outputs, "
        f"{sum(row.tokens for row in compared)} tokens: "
        f"{f'{different} DIFFERENT' if different else 'none different'}. "
        f"{len(results.speeds)} batches timed. {failed} times an engine of ours FAILED.",
    ]
    if compared:
        parts += [
            "## Equal outputs",
            "Each engine is compared with an eager engine that computed each prompt alone. Tokens "
            "before the first close choice (closer than rounding) must be equal. `apart`: the "
            "largest difference of a log-probability; from an unquantised cache, the mean.",
            _table(
                ("model", "engine", "", "outputs", "tokens", "apart", "", ""),
                [
                    (
                        *(r.model, r.engine, r.what, r.outputs or "", r.tokens or ""),
                        *("" if r.apart is None else f"{r.apart:.3f}", r.verdict.value, r.detail),
                    )
                    for r in compared
                ],
            ),
        ]
    if results.speeds:
        caches = list(dict.fromkeys(cache for s in results.speeds for cache in s.milliseconds))
        cells = [(s, s.cells()) for s in results.speeds]
        timed = [
            (s.model, s.mode, f"{s.batch}, {s.length}", *(by_cache.get(c, "") for c in caches))
            for s, by_cache in cells
        ]
        parts += [
            "## Decode speed",
            "Milliseconds in which a request gets a token, and tokens per second of the batch: "
            "medians. The engines of a row ran in turn. In brackets: how many times faster k8v4 "
            "is, the median of all rounds. Compare within a row, not with a server.",
            _table(("model", "mode", "batch, tokens", *caches), timed),
        ]
    if machine.get("vLLM's compiled extension") == "missing":
        parts.append(
            "vLLM's compiled extension is missing. Its substitute is slow, and equally slow for "
            "all caches: only the ratios are meaningful, and the real ones are farther from 1."
        )
    if others:
        rows = [(r.model, r.engine, r.what, r.verdict.value, r.detail) for r in others]
        parts += ["## Not run", _table(("model", "engine", "", "", "reason"), rows)]
    backends = dict.fromkeys(
        f"{engine['model']}, {engine['cache_dtype']}: "
        + ", ".join(f"{count} {name}" for name, count in engine["backends"].items())
        for engine in results.engines
    )
    parts.append("Attention backends, by number of layers: " + "; ".join(backends) + ".")
    return "\n\n".join(parts) + "\n"


def _table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    return "\n".join(table(heads, [[str(c).replace("|", "\\|") for c in row] for row in rows]))
