# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.gpu.checks import checks, few_checks
from benchmarks.gpu.environment import Budget, device_for_kernels, interpreted, machine
from benchmarks.gpu.processes import compile_ahead, run_checks
from benchmarks.gpu.report import MARKDOWN, Report
from benchmarks.gpu.sections import copy_bandwidth, measure
from benchmarks.gpu.shapes import FULL, QUICK, SECTIONS, SMALLEST, Job
from benchmarks.gpu.tune import tune

DEFAULT_BUDGET = 450.0
"""Seconds. With start-up and writing, a run takes 8 minutes."""

SHARE_OF_CHECKS = 0.4
"""Share of the time that the checks may take."""

SHARE_OF_COMPILING = 0.15
"""Share of the time that compiling ahead may take."""

RESERVED = 20.0
"""Seconds reserved for the last measurement and for writing."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check the GPU kernels on this GPU and measure them against other kernels.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter rounds")
    parser.add_argument("--smallest", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("correctness", *SECTIONS), help="one section")
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET, metavar="SECONDS",
                        help="stop after this time, most important shapes first "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="measure nothing if a check fails")
    parser.add_argument("--tune", action="store_true",
                        help="find the fastest tile sizes for this GPU instead")  # fmt: skip
    return parser.parse_args()


def main() -> int:
    """Check, measure and write; return 1 if our kernels are wrong or fail."""
    arguments = _arguments()
    budget = Budget(arguments.budget)
    device = device_for_kernels()
    if interpreted() and not arguments.smallest:
        print("Triton interprets: pass --smallest; other sizes take hours", file=sys.stderr)
        return 2
    if arguments.tune:
        return tune(arguments.out, device, budget)
    report = Report(machine(device))
    if arguments.only in (None, "correctness"):
        wanted = few_checks() if arguments.smallest else checks()
        report.checks = run_checks(wanted, SHARE_OF_CHECKS * budget.seconds)
        for check in report.checks:
            print(f"{check.outcome}: {check.name}: {check.detail}", flush=True)
    report.write(arguments.out)
    if arguments.strict and report.failed:
        report.skipped.append("all measurements: a check failed, and --strict was given")
    elif arguments.only != "correctness":
        jobs = SMALLEST if arguments.smallest else QUICK if arguments.quick else FULL
        jobs = [job for job in jobs if arguments.only in (None, job.section)]
        seconds = 0.0 if arguments.smallest else 0.4 if arguments.quick else 0.6
        _measure(report, jobs, seconds, device, budget, arguments.out)
    report.seconds = budget.spent
    report.write(arguments.out)
    print((arguments.out / MARKDOWN).read_text())
    return 1 if report.failed else 0


def _measure(
    report: Report,
    jobs: list[Job],
    seconds: float,
    device: torch.device,
    budget: Budget,
    folder: Path,
) -> None:
    """Measure in order until the time is up, and write after each measurement."""
    if device.type == "cuda":
        compile_ahead(jobs, SHARE_OF_COMPILING * budget.seconds)
    bandwidth = copy_bandwidth(1 << (16 if interpreted() else 30), device, seconds)
    report.limits["copy_gb_s"] = bandwidth
    for job in jobs:
        if budget.seconds - budget.spent < RESERVED:
            report.skipped.append(f"{job}: the time was up after {budget.spent:.0f} s")
            continue
        try:
            report.results.append(measure(job, device, seconds, bandwidth))
        except torch.OutOfMemoryError:
            report.skipped.append(f"{job}: out of memory")
        # Only our own kernels raise here. Go on with the other shapes.
        except Exception as error:
            report.failures.append(f"{job}: {type(error).__name__}: {str(error)[:500]}")
        report.seconds = budget.spent
        report.write(folder)
        print(f"{budget.spent:5.0f} s: {job}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
