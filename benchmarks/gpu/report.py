# SPDX-License-Identifier: Apache-2.0
"""Write the files of a run: JSON for each part, and Markdown for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import CheckResult
from benchmarks.gpu.children import FAILED
from benchmarks.gpu.goals import GOALS, OURS, STOCK, Result, verdict
from benchmarks.gpu.sections import LAYERS_OF_A_MODEL
from benchmarks.gpu.shapes import PAGE, PARTS, SECTIONS
from benchmarks.markdown import table

JSON, MARKDOWN = "gpu-{}.json", "gpu.md"

REHEARSAL = (
    "**This is a rehearsal: Triton interpreted the kernels on a CPU, at tiny sizes. No number here "
    "is a speed.**"
)

_PREDICTED = (
    "Our kernel without planning. `benchmarks.gpu.predictions` predicts it from the machine code "
    "of the installed Triton. The ratio is the measured time divided by the predicted time."
)

_METHOD = (
    "Medians of CUDA-graph replays in one process, contenders in alternating rounds; pages of "
    f"{PAGE} tokens; caches of several layers in turn if one would stay in the L2 cache. In "
    "brackets: the time divided by ours, the median over pairs of samples, and the share of the "
    "copy bandwidth at which the contender read its own bytes. Ours includes a plan shared by "
    f"{LAYERS_OF_A_MODEL} layers. Quartiles are in the JSON."
)


@dataclass
class Report:
    """The results of one part of a run.

    Attributes:
        part: The part, see `shapes.PARTS`.
        machine: The machine and versions; `interpreted` if times mean nothing.
        budget: The part's time limit in seconds.
        compile_seconds, seconds: The time of compiling, and of everything after it.
        limits: The copy bandwidth, `copy_gb_s`; empty before it is measured.
        failures: Measurements in which our kernels failed.
        skipped: What was not run, and why.
    """

    part: str
    machine: Mapping[str, Any]
    budget: float
    checks: list[CheckResult] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    compile_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether a check failed or was not run, or our kernels failed."""
        outcomes = {check.outcome for check in self.checks}
        reasons = [reason for one in self.results for reason in one["left_out"].values()]
        wrong = any(reason.startswith(FAILED) for reason in reasons)
        return bool(outcomes & {"failed", "not run"} or self.failures or wrong)

    def write(self, folder: Path) -> None:
        """Write the part's file, and overwrite that of an earlier run."""
        folder.mkdir(parents=True, exist_ok=True)
        everything = asdict(self) | {"failed": self.failed}
        path = folder / JSON.format(self.part)
        path.write_text(json.dumps(everything, indent=1, default=str) + "\n")


def write_summary(folder: Path) -> str:
    """Write a Markdown file from the files of all parts in a folder, and return its text."""
    files = [folder / JSON.format(part) for part in PARTS]
    parts = [json.loads(file.read_text()) for file in files if file.exists()]
    text = "\n".join(_lines(parts)) + "\n"
    (folder / MARKDOWN).write_text(text)
    return text


def _lines(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["# k8v4 on a GPU", ""]
    if any(part["machine"]["interpreted"] for part in parts):
        lines += [REHEARSAL, ""]
    machines = [part["machine"] for part in parts]
    lines += [f"- {key}: {of}" for key, of in (machines[0] if machines else {}).items()]
    if any(machine != machines[0] for machine in machines):
        lines += ["", "**The parts ran on different machines.**"]
    rows = []
    for part in parts:
        checks, passed = part["checks"], [c for c in part["checks"] if c["outcome"] == "passed"]
        done = f"{len(passed)} of {len(checks)} passed" if checks else str(len(part["results"]))
        seconds = (part["compile_seconds"], part["seconds"], part["budget"])
        failed = str(len(part["failures"]) + sum(c["outcome"] == "failed" for c in checks))
        cells = [PARTS[part["part"]].title, done, failed, str(len(part["skipped"]))]
        rows.append(cells + [f"{number:.0f}" for number in seconds])
    columns = ["part", "done", "failed", "not run", "compiling, s", "taken, s", "limit, s"]
    lines += ["", "## Parts", "", *table(columns, rows), ""]
    checks = [check for part in parts for check in part["checks"]]
    lines += [f"- {c['outcome']}: {c['name']}: {c['detail']}" for c in checks
              if c["outcome"] != "passed"]  # fmt: skip
    results = [result for part in parts for result in part["results"]]
    lines += ["", "## Predicted and measured", "", _PREDICTED, "", *_predicted_table(results)]
    goals = [verdict(goal, results) for goal in GOALS]
    lines += ["", "## Goals", "", *_goal_table(goals), "", "## Times", "", _METHOD, ""]
    lines += [
        f"- {PARTS[part['part']].title}, {name}: {limit:.0f}"
        for part in parts for name, limit in part["limits"].items()
    ]  # fmt: skip
    for section, title in SECTIONS.items():
        found = [one for one in results if one["section"] == section and "ms" in one]
        if found:
            lines += ["", f"### {title}", "", *_time_table(section, found)]
    lines += ["", "## Failures and what was left out", ""]
    lines += [f"- failure: {failure}" for part in parts for failure in part["failures"]]
    lines += [f"- {skipped}" for part in parts for skipped in part["skipped"]]
    return [*lines, *(f"- left out: {reason}" for reason in _left_out(results))]


def _predicted_table(results: Sequence[Result]) -> list[str]:
    rows = []
    for one in results:
        if "ms" not in one:
            continue
        of_ours = one.get("kernel_ms", one["ms"][OURS])["median"]
        predicted, measured = one["predicted_ms"], f"{1e3 * of_ours:.1f}"
        cells = [one["section"], _where(one), f"no prediction: {predicted}", measured, ""]
        if not isinstance(predicted, str):
            cells[2:] = f"{1e3 * predicted:.1f}", measured, f"{of_ours / predicted:.2f}"
        rows.append(cells)
    columns = ["section", "heads, batch, tokens, new", "predicted, µs", "measured, µs", "ratio"]
    return table(columns, rows)


def _where(result: Result) -> str:
    return "{heads}, {batch}, {tokens}, {new}".format(**result["shape"])


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
    rows = [[_where(one), *(_time(one, name) for name in names)] for one in results]
    columns = ["heads, batch, tokens, new", *(f"{name}, µs" for name in names)]
    notes = sorted({(name, note) for one in results for name, note in one["notes"].items()})
    return [*table(columns, rows), "", *(f"- {name}: {note}" for name, note in notes)]


def _left_out(results: Sequence[Result]) -> list[str]:
    """Return one line for each contender and reason, with the number of shapes."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for one in results:
        for name, reason in one["left_out"].items():
            shapes.setdefault((name, reason), []).append(f"{one['section']} {_where(one)}")
    return [
        f"{name}: {reason} ({len(where)} shapes, for example {where[0]})"
        for (name, reason), where in shapes.items()
    ]
