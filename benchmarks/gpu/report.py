# SPDX-License-Identifier: Apache-2.0
"""The files: JSON with everything, a Markdown table for people, the roofline picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.correctness import Finding
from benchmarks.gpu.goals import STOCK, Verdict, verdicts
from benchmarks.gpu.roofline import draw
from benchmarks.gpu.sections import LAYERS_OF_A_MODEL, Limits
from benchmarks.gpu.shapes import PAGE

JSON, MARKDOWN, PICTURE = "gpu.json", "gpu.md", "gpu_roofline.png"

OURS = "ours"


@dataclass
class Report:
    """All that a run found.

    Attributes:
        machine: As `environment.machine` says.
        findings: Of the checks.
        limits: What the device can do, once measured.
        results: Of the measurements.
        failures: What of ours failed while it was measured.
        skipped: What was not measured, and why.
        seconds: How long the run took.
        clocks_after: Driver and clocks when it ended.
    """

    machine: Mapping[str, Any]
    findings: list[Finding] = field(default_factory=list)
    limits: Limits | None = None
    results: list[Mapping[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0
    clocks_after: Mapping[str, str] | None = None

    @property
    def failed(self) -> bool:
        """Whether a check failed or was not made, or ours did not run."""
        wrong = any(finding.outcome in ("failed", "not run") for finding in self.findings)
        return wrong or bool(self.failures)

    @property
    def measured(self) -> bool:
        """Whether times mean something: not where Triton interprets."""
        return not self.machine["interpreted"]

    def write(self, folder: Path) -> None:
        """Write the files; what an earlier run left in the folder is written over."""
        folder.mkdir(parents=True, exist_ok=True)
        judged = verdicts(self.results) if self.measured else []
        picture = "Triton interpreted the kernels"
        if self.measured and self.limits is not None:
            title = f"{self.machine['gpu']}: attention over the KV cache"
            picture = draw(self.results, self.limits, title, folder / PICTURE) or PICTURE
        everything = {
            "machine": self.machine,
            "seconds": self.seconds,
            "clocks_after": self.clocks_after,
            "times_mean_something": self.measured,
            "checks": [asdict(finding) for finding in self.findings],
            "limits": None if self.limits is None else asdict(self.limits),
            "goals": [asdict(one) for one in judged],
            "results": self.results,
            "failures": self.failures,
            "skipped": self.skipped,
            "picture": picture,
        }
        (folder / JSON).write_text(json.dumps(everything, indent=1, default=str) + "\n")
        (folder / MARKDOWN).write_text(self.markdown(judged, picture))

    def markdown(self, judged: Sequence[Verdict], picture: str) -> str:
        """Return the report for people.

        Args:
            judged: The goals beside what was measured.
            picture: The file of the picture, or why there is none.
        """
        lines = ["# k8v4 on a GPU", "", *_machine_lines(self.machine), ""]
        lines += ["## Correctness", "", *_finding_lines(self.findings), ""]
        if self.measured:
            lines += self._speed(judged)
            shown = picture == PICTURE
            picture_line = f"![roofline]({PICTURE})" if shown else f"No picture: {picture}."
            lines += ["", "## Roofline", "", picture_line]
        else:
            lines += _exercised_lines(self.results)
        if self.failures:
            lines += ["", "## Failures", "", *(f"- {line}" for line in self.failures)]
        left_out = [*self.skipped, *_left_out_lines(self.results)]
        if left_out:
            lines += ["", "## Left out", "", *(f"- {line}" for line in left_out)]
        return "\n".join(lines) + "\n"

    def _speed(self, judged: Sequence[Verdict]) -> list[str]:
        lines = ["## Goals", "", *_goal_lines(judged), "", "## Times", ""]
        lines += [
            f"Medians of CUDA-graph replays in one process, contenders in turn; pages of {PAGE} "
            "tokens, caches of several layers in turn where one would stay in the L2 cache. In "
            "brackets: how many times as long as ours, the median over rounds of one round's "
            "ratio, and the share of the copy bandwidth at which its own bytes were read. "
            f"Ours includes a plan shared by {LAYERS_OF_A_MODEL} layers. Quartiles are in the "
            "JSON.",
        ]
        if self.limits is not None:
            lines += [
                "",
                f"Copy bandwidth {self.limits.copy_gb_s:.0f} GB/s, read and written; a bf16 "
                f"product {self.limits.matmul_tflop_s:.0f} TFLOP/s.",
            ]
        titles = {
            "decode": "Decode: one new token a request",
            "verify": "Verification of several tokens",
            "chunked": "Chunked prefill over cached context",
            "prefill": "Whole prompts",
            "store": "Quantise and store",
        }
        for section, title in titles.items():
            results = [one for one in self.results if one["section"] == section and "ms" in one]
            if results:
                lines += ["", f"### {title}", "", *_section_lines(section, results)]
                lines += _note_lines(results)
        return lines


def _machine_lines(machine: Mapping[str, Any]) -> list[str]:
    versions = (
        f"torch {machine['torch']}, Triton {machine['triton']}, vLLM {machine['vllm'] or 'absent'}"
    )
    if machine["interpreted"]:
        return [
            f"Triton's interpreter on a CPU; {versions}.",
            "",
            "**Nothing here says anything about speed.** The kernels were interpreted at tiny "
            "sizes, to show that the command works; what is called bf16 was fp16, for the "
            "interpreter cannot multiply bf16.",
        ]
    smi = machine["nvidia_smi"] or {}
    major, minor = machine["compute_capability"]
    driver = smi.get("driver_version", "unknown (no nvidia-smi)")
    lines = [
        f"{machine['gpu']}, compute capability {major}.{minor}, {machine['multiprocessors']} "
        f"multiprocessors; driver {driver}; {versions}.",
        "",
        f"The size of a program is {machine['tiling']} for this GPU. Behind vLLM's "
        f"FlashAttention: {machine['flash_attention']}.",
    ]
    if smi:
        lines += [
            "",
            f"Clocks before the run: SM {smi['clocks.sm']} of {smi['clocks.max.sm']}, memory "
            f"{smi['clocks.mem']} of {smi['clocks.max.mem']}; power limit {smi['power.limit']}.",
        ]
    return lines


def _finding_lines(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return ["Not checked in this run."]
    counts = {
        outcome: [one for one in findings if one.outcome == outcome]
        for outcome in ("passed", "failed", "not run", "not here")
    }
    said = ", ".join(f"{len(of)} {outcome}" for outcome, of in counts.items() if of)
    lines = [f"Against the float32 reference, on the device: {said}."]
    unusual = [*counts["failed"], *counts["not run"], *counts["not here"]]
    if unusual:
        lines += ["", *(f"- {one.outcome}: {one.name}: {one.detail}" for one in unusual)]
    return lines


def _goal_lines(judged: Sequence[Verdict]) -> list[str]:
    lines = ["| goal | measured: worst shape | best | shapes | met |", "|---|---|---|---|---|"]
    for one in judged:
        if one.measured is None or one.best is None:
            lines.append(f"| {one.goal} | not measured | | | |")
            continue
        met = "yes" if one.met else "**no**"
        lines.append(
            f"| {one.goal} | {one.measured:.2f} ({one.where}) | {one.best:.2f} | {one.shapes} "
            f"| {met} |"
        )
    return lines


def _time(result: Mapping[str, Any], name: str, with_share: bool) -> str:
    if name not in result["ms"]:
        return ""
    said = []
    if name in result["times_ours"]:
        said.append(f"{result['times_ours'][name]['median']:.2f}")
    if with_share and name in result["achieved"]:
        said.append(f"{100 * result['achieved'][name]['share_of_copy']:.0f} %")
    cell = f"{1e3 * result['ms'][name]['median']:.1f}"
    return f"{cell} ({', '.join(said)})" if said else cell


def _note_lines(results: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = sorted({(name, note) for one in results for name, note in one["notes"].items()})
    return ["", *(f"- {name}: {note}" for name, note in notes)] if notes else []


def _section_lines(section: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [OURS, STOCK]
    names += sorted({name for one in results for name in one["ms"]} - set(names))
    names = [name for name in names if any(name in one["ms"] for one in results)]
    computing = section in ("chunked", "prefill")
    columns = ["heads", "batch, tokens, new", *(["ours, TFLOP/s"] if computing else [])]
    columns += [f"{name}, µs" for name in names]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    order = sorted(results, key=lambda one: (one["shape"]["heads"], one["shape"]["length"],
                                             one["shape"]["batch"]))  # fmt: skip
    for one in order:
        shape = one["shape"]
        cells = [shape["heads"], f"{shape['batch']}, {shape['length']}, {shape['queries']}"]
        if computing:
            cells.append(f"{one['achieved'][OURS]['tflop_s']:.0f}")
        cells += [_time(one, name, not computing) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _exercised_lines(results: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = ["## Exercised", "", "| section | ran | distance of the output from ours |",
             "|---|---|---|"]  # fmt: skip
    for one in results:
        ran = ", ".join(one.get("ms", {}))
        distances = one.get("distance", {})
        said = ", ".join(f"{name} {distance:.3f}" for name, distance in distances.items())
        lines.append(f"| {one['section']} | {ran} | {said} |")
    return lines


def _left_out_lines(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each contender and reason, with how many shapes it was left out of."""
    shapes: dict[tuple[str, str], list[str]] = {}
    for one in results:
        for name, reason in one["left_out"].items():
            where = f"{one['section']} {one['shape']['heads']}, {one['shape']['batch']} x "
            shapes.setdefault((name, reason), []).append(where + str(one["shape"]["length"]))
    return [
        f"{name}: {reason} ({len(where)} shapes, among them {where[0]})"
        for (name, reason), where in shapes.items()
    ]
