# SPDX-License-Identifier: Apache-2.0
"""Runs cases in processes, several at a time, and keeps what is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks.prefix_cache.cases import Case, Sources, fingerprint
from benchmarks.prefix_cache.processes import answers
from benchmarks.prefix_cache.worker import Job, sources_fingerprint

Row = dict[str, Any]

JOURNAL = "runs.jsonl"
CASES_OF_A_PROCESS = 8
"""What is described once may run so often. More, and the processes end at very different times."""


class SourcesChangedError(RuntimeError):
    """The package changed while it was measured."""


class Journal:
    """Finished runs, in a file of JSON lines that is only ever appended to."""

    def __init__(self, file: Path) -> None:
        """Name the file; it and its folder need not be there."""
        self.folder = file.parent
        self._file = file
        self._lock = Lock()

    def append(self, row: Row) -> None:
        """Keep a run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock, self._file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    def find(
        self, cases: Iterable[Case], sources: Callable[[str], str], traces: Mapping[str, str]
    ) -> list[Row]:
        """Return the newest run of each case that was of these sources and these traces.

        Args:
            cases: The cases.
            sources: `sources_fingerprint`, of a strategy.
            traces: The fingerprint of each case's trace, by `trace_key`.
        """
        kept: dict[str, Row] = {}
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    # The line that was being written as the sweep was interrupted.
                    continue
                kept[_key(row, row["sources"], row["trace_fingerprint"])] = row
        wanted = (
            _key(asdict(case), sources(case.strategy), traces[trace_key(case)]) for case in cases
        )
        return [kept[key] for key in wanted if key in kept]


def trace_key(case: Case) -> str:
    """Return what names the requests of a case."""
    return f"{case.trace} {case.requests}"


def fingerprints(cases: Iterable[Case], sources: Sources) -> dict[str, str]:
    """Return the fingerprint of each trace of some cases, by `trace_key`."""
    return {
        key: fingerprint(sources.requests(case.trace, case.requests))
        for key, case in {trace_key(case): case for case in cases}.items()
    }


def case_of(row: Row) -> Case:
    """Return the case that a row is of."""
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})


def sweep(
    cases: Sequence[Case],
    sources: Sources,
    journal: Journal,
    jobs: int,
    resume: bool,
    say: Callable[[str], None],
) -> list[Row]:
    """Run cases, and return a row for each, in their order.

    Args:
        cases: What to run.
        sources: Where the requests come from.
        journal: Takes each run as it is done.
        jobs: Processes at a time.
        resume: Take from the journal what it has of these sources and traces.
        say: Is told of each run that is done.

    Raises:
        ChildError: A process failed. What was done until then is in the journal.
        SourcesChangedError: The package changed meanwhile.
    """
    code = {case.strategy: sources_fingerprint(case.strategy) for case in cases}
    done: dict[Case, Row] = {}
    if resume:
        found = journal.find(cases, code.__getitem__, fingerprints(cases, sources))
        done = {case_of(row): row for row in found}
        say(f"{len(done)} of {len(cases)} runs are there already")
    public = str(sources.public.resolve()) if sources.public else None
    left = [case for case in cases if case not in done]
    begun = time.monotonic()
    lock = Lock()

    def work(number: int, some: tuple[Case, ...]) -> None:
        log = journal.folder / f"process-{number}.txt"
        for row in answers("benchmarks.prefix_cache.worker", Job(public, some).to_json(), log):
            if row["sources"] != code[row["strategy"]]:
                raise SourcesChangedError("the package changed while it was measured: start again")
            journal.append(row)
            with lock:
                done[case_of(row)] = row
                say(_progress(len(done), len(cases), len(left), row, time.monotonic() - begun))

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, number, some) for number, some in enumerate(batches(left))]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[case] for case in cases]


def batches(cases: Iterable[Case]) -> list[tuple[Case, ...]]:
    """Share out cases to processes: of one model, one dtype and one trace each."""
    alike: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        alike.setdefault((case.model, case.kv_cache_dtype, trace_key(case)), []).append(case)
    return [
        tuple(some[start : start + CASES_OF_A_PROCESS])
        for some in alike.values()
        for start in range(0, len(some), CASES_OF_A_PROCESS)
    ]


def _key(fields: Row, sources: str, trace: str) -> str:
    case = {name: fields[name] for name in Case.__dataclass_fields__}
    return json.dumps([case, sources, trace], sort_keys=True)


def _progress(done: int, of: int, left: int, row: Row, seconds: float) -> str:
    here = done - (of - left)
    minutes = seconds / here * (of - done) / 60
    result = "does not fit"
    if row["fits"]:
        result = f"{row['hit_rate']:.2%} in {row['cpu_seconds']:.0f} s of CPU time"
    return f"[{done}/{of}, {minutes:.0f} min left] {case_of(row).title}: {result}"
