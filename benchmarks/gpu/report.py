# SPDX-License-Identifier: Apache-2.0
"""Write the files of a run: JSON with everything, and Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import CheckResult
from benchmarks.gpu.goals import GOALS, OURS, STOCK, Result, verdict
from benchmarks.gpu.sections import LAYERS_OF_A_MODEL
from benchmarks.gpu.shapes import PAGE, SECTIONS
from benchmarks.markdown import table

JSON, MARKDOWN = "gpu.json", "gpu.md"

_METHOD = (
    "Medians of CUDA-graph replays in one process, contenders in alternating rounds; pages of "
    f"{PAGE} tokens; caches of several layers in turn if one would stay in the L2 cache. In "
    "brackets: the time divided by ours, the median over pairs of samples, and the share of the "
    "copy bandwidth at which the contender read its own bytes. Ours includes a plan shared by "
    f"{LAYERS_OF_A_MODEL} layers. Quartiles are in the JSON."
)


@dataclass
class Report:
    """The results of a run.

    Attributes:
        machine: The machine and versions; `interpreted` if times mean nothing.
        limits: The copy bandwidth, `copy_gb_s`; empty before it is measured.
        failures: Measurements in which our kernels failed.
        skipped: What was not measured, and why.
    """

    machine: Mapping[str, Any]
    checks: list[CheckResult] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether a check failed or was not run, or our kernels failed."""
        outcomes = {check.outcome for check in self.checks}
        return bool(outcomes & {"failed", "not run"} or self.failures)

    def write(self, folder: Path) -> None:
        """Write the files, and overwrite those of an earlier run."""
        folder.mkdir(parents=True, exist_ok=True)
        measured = not self.machine["interpreted"]
        goals = [verdict(goal, self.results) for goal in GOALS] if measured else []
        everything = asdict(self) | {"times_mean_something": measured, "goals": goals}
        (folder / JSON).write_text(json.dumps(everything, indent=1, default=str) + "\n")
        (folder / MARKDOWN).write_text("\n".join(self._lines(goals)) + "\n")

    def _lines(self, goals: Sequence[Mapping[str, Any]]) -> list[str]:
        lines = ["# k8v4 on a GPU", "", *(f"- {key}: {of}" for key, of in self.machine.items())]
        passed = sum(check.outcome == "passed" for check in self.checks)
        lines += ["", "## Correctness", ""]
        lines += [f"{passed} of {len(self.checks)} checks passed, compared with the reference."]
        lines += ["", *(
            f"- {check.outcome}: {check.name}: {check.detail}"
            for check in self.checks if check.outcome != "passed"
        )]  # fmt: skip
        if goals:
            lines += ["", "## Goals", "", *_goal_table(goals), "", "## Times", "", _METHOD, ""]
            lines += [f"- {name}: {limit:.0f}" for name, limit in self.limits.items()]
            for section, title in SECTIONS.items():
                results = [one for one in self.results if one["section"] == section and "ms" in one]
                if results:
                    lines += ["", f"### {title}", "", *_time_table(section, results)]
        else:
            lines += ["", "Triton interpreted the kernels, so this report contains no speeds."]
        items = [f"failure: {failure}" for failure in self.failures]
        items += [f"left out: {reason}" for reason in (*self.skipped, *_left_out(self.results))]
        return [*lines, "", "## Failures and what was left out", "", *(f"- {one}" for one in items)]


def _goal_table(goals: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for goal in goals:
        row = [goal["goal"], "not measured", "", "", ""]
        if goal["met"] is not None:
            worst = f"{goal['measured']:.2f} ({goal['where']})"
            met = "yes" if goal["met"] else "**no**"
            row[1:] = [worst, f"{goal['best']:.2f}", str(goal["shapes"]), met]
        rows.append(row)
    return table(["goal", "measured: worst shape", "best", "shapes", "met"], rows)


def _time(result: Result, name: str) -> str:
    """Format the median in microseconds, with the ratio to ours and the share of bandwidth."""
    if name not in result["ms"]:
        return ""
    notes = []
    if name in result["times_ours"]:
        notes.append(f"{result['times_ours'][name]['median']:.2f}")
    if name in result["achieved"]:
        achieved = result["achieved"][name]
        computing = result["section"] in ("chunked", "prefill")
        notes.append(
            f"{achieved['tflop_s']:.0f} TFLOP/s"
            if computing
            else f"{100 * achieved['share_of_copy']:.0f} %"
        )
    cell = f"{1e3 * result['ms'][name]['median']:.1f}"
    return f"{cell} ({', '.join(notes)})" if notes else cell


def _time_table(section: str, results: Sequence[Result]) -> list[str]:
    measured = {name for one in results for name in one["ms"]}
    names = sorted(measured, key=lambda name: (name != OURS, name != STOCK, name))
    rows = []
    for one in sorted(results, key=lambda one: str(one["shape"])):
        shape = one["shape"]
        cells = [shape["heads"], f"{shape['batch']}, {shape['length']}, {shape['queries']}"]
        rows.append(cells + [_time(one, name) for name in names])
    columns = ["heads", "batch, tokens, new", *(f"{name}, µs" for name in names)]
    notes = sorted({(name, note) for one in results for name, note in one["notes"].items()})
    return [*table(columns, rows), "", *(f"- {name}: {note}" for name, note in notes)]


def _left_out(results: Sequence[Result]) -> list[str]:
    """Return one line for each contender and reason, with the number of shapes."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for one in results:
        where = f"{one['section']} {{heads}}, {{batch}} x {{length}}".format(**one["shape"])
        for name, reason in one["left_out"].items():
            shapes.setdefault((name, reason), []).append(where)
    return [
        f"{name}: {reason} ({len(where)} shapes, for example {where[0]})"
        for (name, reason), where in shapes.items()
    ]
