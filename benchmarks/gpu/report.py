# SPDX-License-Identifier: Apache-2.0
"""The files of a run: JSON with everything, Markdown, and the roofline picture."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import CheckResult
from benchmarks.gpu.goals import OURS, STOCK, Result, Verdict, verdicts
from benchmarks.gpu.sections import LAYERS_OF_A_MODEL, Limits
from benchmarks.gpu.shapes import PAGE
from benchmarks.markdown import table

JSON, MARKDOWN, PICTURE = "gpu.json", "gpu.md", "gpu_roofline.png"

_TITLES = {
    "decode": "Decode: one new token a request",
    "verify": "Verification of several tokens",
    "chunked": "Chunked prefill over cached context",
    "prefill": "Whole prompts",
    "store": "Quantise and store",
}


@dataclass
class Report:
    """The results of a run.

    Attributes:
        failures: Measurements in which our kernels failed.
        skipped: What was not measured, and why.
    """

    machine: Mapping[str, Any]
    checks: list[CheckResult] = field(default_factory=list)
    limits: Limits | None = None
    results: list[Result] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0
    clocks_after: Mapping[str, str] | None = None

    @property
    def failed_checks(self) -> list[CheckResult]:
        return [check for check in self.checks if check.outcome in ("failed", "not run")]

    @property
    def failed(self) -> bool:
        """Whether a check failed or was not run, or our kernels failed."""
        return bool(self.failed_checks or self.failures)

    @property
    def measured(self) -> bool:
        """Whether times mean something, which they do not if Triton interprets."""
        return not self.machine["interpreted"]

    def write(self, folder: Path) -> None:
        """Write the files, and overwrite those of an earlier run."""
        folder.mkdir(parents=True, exist_ok=True)
        goals = verdicts(self.results) if self.measured else []
        picture = "Triton interpreted the kernels"
        if self.measured and self.limits is not None:
            title = f"{self.machine['gpu']}: attention over the KV cache"
            picture = draw(self.results, self.limits, title, folder / PICTURE) or PICTURE
        everything = {
            "machine": self.machine,
            "seconds": self.seconds,
            "clocks_after": self.clocks_after,
            "times_mean_something": self.measured,
            "checks": [asdict(check) for check in self.checks],
            "limits": None if self.limits is None else asdict(self.limits),
            "goals": [asdict(goal) for goal in goals],
            "results": self.results,
            "failures": self.failures,
            "skipped": self.skipped,
            "picture": picture,
        }
        (folder / JSON).write_text(json.dumps(everything, indent=1, default=str) + "\n")
        (folder / MARKDOWN).write_text(self.markdown(goals, picture))

    def markdown(self, goals: Sequence[Verdict], picture: str) -> str:
        """Return the report in Markdown.

        Args:
            goals: The goals and whether they are met.
            picture: The file of the picture, or why there is none.
        """
        lines = ["# k8v4 on a GPU", "", *_machine_lines(self.machine), ""]
        lines += ["## Correctness", "", *_check_lines(self.checks), ""]
        if self.measured:
            lines += ["## Goals", "", *_goal_lines(goals), "", *self._time_lines()]
            line = f"![roofline]({PICTURE})" if picture == PICTURE else f"No picture: {picture}."
            lines += ["", "## Roofline", "", line]
        else:
            lines += _interpreted_lines(self.results)
        left_out = [*self.skipped, *_left_out_lines(self.results)]
        for title, items in (("Failures", self.failures), ("Left out", left_out)):
            if items:
                lines += ["", f"## {title}", "", *(f"- {item}" for item in items)]
        return "\n".join(lines) + "\n"

    def _time_lines(self) -> list[str]:
        lines = ["## Times", ""]
        lines += [
            "Medians of CUDA-graph replays in one process, contenders in alternating rounds; pages "
            f"of {PAGE} tokens; caches of several layers in turn if one would stay in the L2 "
            "cache. In brackets: the time divided by ours, the median over pairs of samples, and "
            "the share of the copy bandwidth at which the contender read its own bytes. Ours "
            f"includes a plan shared by {LAYERS_OF_A_MODEL} layers. Quartiles are in the JSON.",
        ]
        if self.limits is not None:
            lines += [
                "",
                f"Copy bandwidth {self.limits.copy_gb_s:.0f} GB/s, read and written; a bf16 "
                f"product {self.limits.matmul_tflop_s:.0f} TFLOP/s.",
            ]
        for section, title in _TITLES.items():
            results = [one for one in self.results if one["section"] == section and "ms" in one]
            if results:
                lines += ["", f"### {title}", "", *_section_lines(section, results)]
        return lines


def _machine_lines(machine: Mapping[str, Any]) -> list[str]:
    versions = (
        f"torch {machine['torch']}, Triton {machine['triton']}, vLLM {machine['vllm'] or 'absent'}"
    )
    if machine["interpreted"]:
        return [
            f"Triton's interpreter on a CPU; {versions}.",
            "",
            "**This report contains no speeds.** The kernels were interpreted at tiny sizes, to "
            "test the command. fp16 replaced bf16, because the interpreter cannot multiply bf16.",
        ]
    smi = machine["nvidia_smi"] or {}
    major, minor = machine["compute_capability"]
    driver = smi.get("driver_version", "unknown (no nvidia-smi)")
    lines = [
        f"{machine['gpu']}, compute capability {major}.{minor}, {machine['multiprocessors']} "
        f"multiprocessors; driver {driver}; {versions}.",
        "",
        f"The tile sizes are {machine['tiling']} for this GPU. vLLM's FlashAttention is "
        f"{machine['flash_attention']}.",
    ]
    if smi:
        lines += [
            "",
            f"Clocks before the run: SM {smi['clocks.sm']} of {smi['clocks.max.sm']}, memory "
            f"{smi['clocks.mem']} of {smi['clocks.max.mem']}; power limit {smi['power.limit']}.",
        ]
    return lines


def _check_lines(checks: Sequence[CheckResult]) -> list[str]:
    if not checks:
        return ["Not checked in this run."]
    counts = {
        outcome: [check for check in checks if check.outcome == outcome]
        for outcome in ("passed", "failed", "not run", "unavailable")
    }
    summary = ", ".join(f"{len(of)} {outcome}" for outcome, of in counts.items() if of)
    lines = [f"Against the float32 reference, on the device: {summary}."]
    if len(counts["passed"]) < len(checks):
        lines.append("")
    for outcome in ("failed", "not run", "unavailable"):
        lines += [f"- {outcome}: {check.name}: {check.detail}" for check in counts[outcome]]
    return lines


def _goal_lines(goals: Sequence[Verdict]) -> list[str]:
    rows = []
    for goal in goals:
        if goal.measured is None:
            rows.append([goal.goal, "not measured", "", "", ""])
            continue
        worst, met = f"{goal.measured:.2f} ({goal.where})", "yes" if goal.met else "**no**"
        rows.append([goal.goal, worst, f"{goal.best:.2f}", str(goal.shapes), met])
    return table(["goal", "measured: worst shape", "best", "shapes", "met"], rows)


def _time(result: Result, name: str, with_share: bool) -> str:
    if name not in result["ms"]:
        return ""
    notes = []
    if name in result["times_ours"]:
        notes.append(f"{result['times_ours'][name]['median']:.2f}")
    if with_share and name in result["achieved"]:
        notes.append(f"{100 * result['achieved'][name]['share_of_copy']:.0f} %")
    cell = f"{1e3 * result['ms'][name]['median']:.1f}"
    return f"{cell} ({', '.join(notes)})" if notes else cell


def _section_lines(section: str, results: Sequence[Result]) -> list[str]:
    measured = {name for one in results for name in one["ms"]}
    first = [name for name in (OURS, STOCK) if name in measured]
    names = [*first, *sorted(measured - set(first))]
    computing = section in ("chunked", "prefill")
    columns = ["heads", "batch, tokens, new", *(["ours, TFLOP/s"] if computing else [])]
    rows = []
    for one in results:
        shape = one["shape"]
        cells = [shape["heads"], f"{shape['batch']}, {shape['length']}, {shape['queries']}"]
        if computing:
            cells.append(f"{one['achieved'][OURS]['tflop_s']:.0f}")
        order = (shape["heads"], shape["length"], shape["batch"])
        rows.append((order, cells + [_time(one, name, not computing) for name in names]))
    lines = table([*columns, *(f"{name}, µs" for name in names)], [row for _, row in sorted(rows)])
    notes = sorted({(name, note) for one in results for name, note in one["notes"].items()})
    return lines + (["", *(f"- {name}: {note}" for name, note in notes)] if notes else [])


def _interpreted_lines(results: Iterable[Result]) -> list[str]:
    rows = []
    for one in results:
        distances = ", ".join(f"{name} {d:.3f}" for name, d in one.get("distance", {}).items())
        rows.append([one["section"], ", ".join(one.get("ms", {})), distances])
    columns = ["section", "ran", "distance of the output from ours"]
    return ["## Sections", "", *table(columns, rows)]


def _left_out_lines(results: Iterable[Result]) -> list[str]:
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


_MARKERS = {"decode": "o", "verify": "s", "chunked": "^", "prefill": "D"}
_LEGEND = "circles: decode, squares: verification, triangles: chunks, diamonds: whole prompts"

Points = dict[tuple[str, str], list[tuple[float, float]]]


def points(results: Iterable[Result]) -> Points:
    """Return operations a byte and 1e12 operations a second, by contender and section."""
    found: Points = {}
    for result in results:
        if result["section"] not in _MARKERS:
            continue
        for name, achieved in result.get("achieved", {}).items():
            intensity = achieved["tflop_s"] * 1e3 / achieved["gb_s"]
            found.setdefault((name, result["section"]), []).append((intensity, achieved["tflop_s"]))
    return found


def draw(results: Iterable[Result], limits: Limits, title: str, file: Path) -> str | None:
    """Write the roofline picture.

    Returns:
        Why there is none, or None.
    """
    measured = points(results)
    if not measured:
        return "nothing was measured"
    try:
        importlib.import_module("matplotlib").use("Agg")
        plot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        return f"matplotlib: {error}"
    figure, axes = plot.subplots(figsize=(9, 6))
    names = sorted({name for name, _ in measured}, key=lambda name: (name != OURS, name))
    intensities = [x for of_one in measured.values() for x, _ in of_one]
    ridge = limits.matmul_tflop_s * 1e3 / limits.copy_gb_s
    roof_at = sorted({0.5 * min(intensities), ridge, max(2 * max(intensities), ridge)})
    roof = [min(limits.matmul_tflop_s, x * limits.copy_gb_s / 1e3) for x in roof_at]
    axes.plot(roof_at, roof, color="black", label="copy bandwidth, bf16 product (measured)")
    for (name, section), of_one in measured.items():
        label = name if section == "decode" or (name, "decode") not in measured else None
        axes.scatter(*zip(*of_one, strict=True), s=26, marker=_MARKERS[section],
                     color=f"C{names.index(name) % 10}", label=label)  # fmt: skip
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations for a byte of KV cache in the format of the contender",
        ylabel="10^12 operations a second",
        title=title,
    )
    axes.text(0.01, 0.01, _LEGEND, transform=axes.transAxes, fontsize=7)
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plot.close(figure)
    return None
