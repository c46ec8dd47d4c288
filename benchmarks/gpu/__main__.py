# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.gpu`; the package says what it does."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.gpu.environment import Budget, device_for_kernels, interpreted, machine, nvidia_smi
from benchmarks.gpu.matrix import checks
from benchmarks.gpu.processes import compile_ahead, run_checks
from benchmarks.gpu.report import MARKDOWN, Report
from benchmarks.gpu.sections import measure_limits, measure_of
from benchmarks.gpu.shapes import FULL, QUICK, SECTIONS, SMALLEST, Job, Preset, jobs
from benchmarks.gpu.tune import tune

DEFAULT_BUDGET = 450.0
"""Seconds: 8 minutes with room for starting up and writing."""

SHARE_OF_CHECKS = 0.4
"""Of the time, what the correctness matrix may take."""

SHARE_OF_COMPILING = 0.15
"""Of the time, what compiling ahead may take."""

RESERVED = 20.0
"""Seconds that are kept for the measurement that is under way, and for writing."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Are the GPU kernels right on this GPU, and how fast are they?",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter rounds")
    parser.add_argument("--smallest", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("correctness", *SECTIONS), help="one section")
    parser.add_argument(
        "--budget",
        type=float,
        default=DEFAULT_BUDGET,
        metavar="SECONDS",
        help="when to stop, most important shapes first (default: %(default)s)",
    )
    parser.add_argument("--strict", action="store_true", help="measure nothing if a check fails")
    parser.add_argument("--tune", action="store_true",
                        help="find the fastest size of program for this GPU instead")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Check, measure and write; return 1 if something of ours is wrong."""
    arguments = _arguments()
    budget = Budget(arguments.budget)
    device = device_for_kernels()
    preset = SMALLEST if arguments.smallest else QUICK if arguments.quick else FULL
    if interpreted() and not arguments.smallest:
        print("Triton interprets: take --smallest, anything else takes hours", file=sys.stderr)
        return 2
    if arguments.tune:
        return tune(arguments.out, device, preset, budget)
    report = Report(machine(device))
    if arguments.only in (None, "correctness"):
        report.findings = run_checks(
            checks(smallest=arguments.smallest), SHARE_OF_CHECKS * budget.seconds
        )
        _say_findings(report)
    report.write(arguments.out)
    if arguments.only != "correctness" and not (arguments.strict and report.failed):
        _measure(report, jobs(preset, arguments.only), preset, device, budget, arguments.out)
    elif arguments.strict and report.failed:
        report.skipped.append("all measurements: a check failed, and --strict was given")
    report.seconds = budget.spent
    report.clocks_after = nvidia_smi()
    report.write(arguments.out)
    print((arguments.out / MARKDOWN).read_text())
    return 1 if report.failed else 0


def _say_findings(report: Report) -> None:
    wrong = [one for one in report.findings if one.outcome in ("failed", "not run")]
    print(f"{len(report.findings)} checks, {len(wrong)} failed or not run", flush=True)
    for one in wrong:
        print(f"  {one.outcome}: {one.name}: {one.detail}", flush=True)


def _measure(
    report: Report,
    wanted: list[Job],
    preset: Preset,
    device: torch.device,
    budget: Budget,
    folder: Path,
) -> None:
    """Take the measurements in order until the time is up, and write after each."""
    if device.type == "cuda":
        compile_ahead(wanted, SHARE_OF_COMPILING * budget.seconds)
    for job in wanted:
        if job.section == "bandwidth":
            report.limits = measure_limits(preset.copied_bytes, device, preset.seconds)
            continue
        where = f"{job.section}, {job.shape}"
        if budget.left < RESERVED:
            report.skipped.append(f"{where}: the time was up after {budget.spent:.0f} s")
            continue
        assert report.limits is not None, "the bandwidth is the first job"
        start = time.monotonic()
        try:
            result = measure_of(job.section)(job, device, preset.seconds, report.limits)
        except torch.OutOfMemoryError:
            report.skipped.append(f"{where}: out of memory")
            continue
        # Only ours raises here, and the other shapes shall still be measured.
        except Exception as error:
            report.failures.append(f"{where}: {type(error).__name__}: {str(error)[:500]}")
            continue
        report.results.append(result)
        report.seconds = budget.spent
        report.write(folder)
        print(f"{budget.spent:5.0f} s: {where}: {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
