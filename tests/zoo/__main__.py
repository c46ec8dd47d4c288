# SPDX-License-Identifier: Apache-2.0
"""Plan every architecture, run an engine for every pattern and write the tables: `make zoo`."""

from __future__ import annotations

import argparse
import contextlib

from testing.engine_host import EngineError
from tests.conformance.releases import environment_of, unpacked_wheel
from tests.zoo.architectures import MINORS, architectures
from tests.zoo.language_models import LANGUAGE_MODELS
from tests.zoo.planner import refused
from tests.zoo.report import representatives, write
from tests.zoo.results import Results
from tests.zoo.workers import ROOT, Worker

LOG = ROOT / ".cache" / "zoo.log"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="only these architectures")
    parser.add_argument("--part", choices=("plans", "engines", "tables"), help="only this part")
    parser.add_argument("--keep", action="store_true", help="keep rows that older sources computed")
    options = parser.parse_args()
    LOG.parent.mkdir(exist_ok=True)
    results = Results(keep=options.keep)
    if options.part in (None, "plans"):
        plan_all(results, set(options.names))
    if options.part in (None, "engines"):
        run_all(results, set(options.names))
    write(results.tables)


def plan_all(results: Results, only: set[str]) -> None:
    """Plan every architecture, except multimodal ones, which share their language model's plan."""
    for minor in MINORS:
        todo = [
            name
            for name, architecture in architectures().items()
            if architecture.minors[0] == minor
            and name not in LANGUAGE_MODELS
            and (not only or name in only)
            and (name in only or not results.done("plans", name))
        ]
        environment = environment_of(minor, unpacked_wheel(minor), ROOT)
        planning = Worker("tests.zoo.planner", LOG, 240.0, **environment)
        with contextlib.closing(planning) as planner:
            for name in todo:
                try:
                    row = planner.ask(name)
                except EngineError as error:
                    row = {"planned_as": name, "plans": refused(error.reason)}
                results.put("plans", name, {"minor": minor, **row})
                print(minor, name, row.get("pattern"), flush=True)


def run_all(results: Results, only: set[str]) -> None:
    """Run one architecture per pattern; try the next one if vLLM on CPUs cannot run it."""
    with contextlib.closing(Worker("tests.zoo.runner", LOG, 300.0)) as runner:
        # Look again after each row: if vLLM cannot run an architecture, another one has to run.
        while todo := [
            name
            for name in representatives(results.tables).values()
            if (not only or name in only) and not results.done("engines", name)
        ]:
            try:
                row = runner.ask(todo[0])
            except EngineError as error:
                row = {"auto": {"refused": error.reason}}
            results.put("engines", todo[0], row)
            print(todo[0], row.get("errors") or row, flush=True)


if __name__ == "__main__":
    main()
