# SPDX-License-Identifier: Apache-2.0
"""Run the parts of the benchmark in child processes, and write each result before the next."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu import checks, sections
from benchmarks.gpu.children import DONE, LOST, OUT_OF_TIME, Child, Outcome, share_out
from benchmarks.gpu.environment import Budget, interpreted, machine
from benchmarks.gpu.goals import OURS
from benchmarks.gpu.predictions import predict_jobs
from benchmarks.gpu.report import Report, write_summary
from benchmarks.gpu.shapes import CHECKS, DEFAULT_PARTS, PARTS, REHEARSED, Job
from benchmarks.gpu.tune import tune

COMPILE_SECONDS = 90.0
"""The time limit for compiling before each part. A kernel that is not compiled by then compiles
when it is measured."""

START_SECONDS = 300.0
"""The time limit for importing vLLM and describing the machine, and for the predictions."""

JOB_SECONDS = 0.6
"""No round of a measurement starts after this time."""


def run(arguments: argparse.Namespace) -> int:
    """Run the parts that the arguments choose; return 1 if our kernels are wrong or fail."""
    if arguments.tune:
        return tune(arguments.out, arguments.budget)
    with Child() as child:
        found = child.call(machine, seconds=START_SECONDS, hang=START_SECONDS)
        if found.status != DONE:
            print(found.value, file=sys.stderr)
            return 2
        return _run_parts(arguments, found.value, child)


def _run_parts(arguments: argparse.Namespace, described: Mapping[str, Any], child: Child) -> int:
    names = [name for name in PARTS if name in (arguments.part or DEFAULT_PARTS)]
    share = arguments.budget / sum(PARTS[name].seconds for name in names)
    device = "H200" if interpreted() else str(described["gpu"])
    failed = False
    with Child() as other, ThreadPoolExecutor(1) as thread:
        # The predictions need only CPUs, so they are computed during the checks.
        jobs = [job for name in names for job in _jobs(name)]
        predictions = thread.submit(
            other.call, predict_jobs, device, jobs,
            seconds=max(START_SECONDS, arguments.budget), hang=START_SECONDS,
        )  # fmt: skip
        for name in names:
            report = Report(name, described, share * PARTS[name].seconds)
            report.write(arguments.out)
            print(f"{PARTS[name].title}: {report.budget:.0f} s", flush=True)
            if name == CHECKS:
                _run_checks(report, arguments.out)
            else:
                _measure(report, _jobs(name), arguments.out, child, predictions)
            failed |= report.failed
    print(write_summary(arguments.out))
    return int(failed)


def _jobs(part: str) -> Sequence[Job]:
    return REHEARSED[part] if interpreted() else PARTS[part].jobs


def _run_checks(report: Report, folder: Path) -> None:
    """Run the checks. Their kernels compile within the limit, because compiling may fail too."""
    wanted = checks.few_checks() if interpreted() else checks.checks()
    items, budget = list(wanted.items()), Budget(report.budget)

    def record(index: int, outcome: Outcome) -> None:
        name = items[index][0]
        if outcome.status == DONE:
            result = outcome.value
        else:
            ran = "not run" if outcome.status == OUT_OF_TIME else "failed"
            result = checks.CheckResult(name, ran, str(outcome.value), 0.0)
        report.checks.append(result)
        report.seconds = budget.spent
        report.write(folder)
        print(f"{budget.spent:5.0f} s: {result.outcome}: {name}: {result.detail}", flush=True)

    processes = 1 if interpreted() else 0
    outcomes = share_out(checks.run, items, report.budget, record, processes)
    recorded = {check.name for check in report.checks}
    for index, outcome in enumerate(outcomes):
        if items[index][0] not in recorded:
            record(index, outcome)


def _measure(
    report: Report, jobs: Sequence[Job], folder: Path, child: Child, predictions: Future[Outcome]
) -> None:
    """Measure the jobs in order until the time is up, and write after each of them."""
    compiling = Budget(COMPILE_SECONDS)
    if not interpreted():
        share_out(sections.compile_job, jobs, COMPILE_SECONDS)
    # Nothing else may run during the measurements.
    predicted = predictions.result()
    report.compile_seconds = compiling.spent
    budget = Budget(report.budget)
    copied = child.call(sections.copy_bandwidth, JOB_SECONDS, seconds=report.budget)
    if copied.status == DONE:
        report.limits["copy_gb_s"] = copied.value
    else:
        report.failures.append(f"copy: {copied.value}")
    for job in jobs:
        outcome = _measure_job(job, child, budget, report.limits.get("copy_gb_s"))
        if outcome.status == DONE:
            by_model = predicted.value
            of_job = by_model[str(job)] if predicted.status == DONE else by_model
            report.results.append(outcome.value | {"predicted_ms": of_job})
        elif outcome.status == OUT_OF_TIME:
            report.skipped.append(f"not run: out of time: {job}: {outcome.value}")
        else:
            where = f" ({outcome.kernel})" if outcome.kernel else ""
            report.failures.append(f"{job}{where}: {outcome.value}")
        report.seconds = budget.spent
        report.write(folder)
        print(f"{budget.spent:5.0f} s: {outcome.status}: {job}", flush=True)


def _measure_job(job: Job, child: Child, budget: Budget, bandwidth: float | None) -> Outcome:
    """Measure a job. A contender that ends the process is left out of a second try."""
    left_out: dict[str, str] = {}
    while (left := budget.seconds - budget.spent) > 0:
        outcome = child.call(sections.measure, job, JOB_SECONDS, bandwidth, left_out, seconds=left)
        if outcome.status != LOST or outcome.kernel in ("", OURS, *left_out):
            return outcome
        left_out = {**left_out, outcome.kernel: f"{outcome.status}: {outcome.value}"}
    return Outcome(OUT_OF_TIME, f"the limit is {budget.seconds:.0f} s")
