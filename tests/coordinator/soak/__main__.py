# SPDX-License-Identifier: Apache-2.0
"""Run many random scheduler steps, and check consistency after each step.

    python -m tests.coordinator.soak [--steps 200000] [--seed N] [--world N] [--strategy NAME]
        [--out FILE]

Exits with 1 at the first inconsistency, and prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import traceback
from pathlib import Path

# vLLM reads these variables when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
from tests.coordinator.soak.plans import STRATEGIES
from tests.coordinator.soak.soak import Soak, report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.coordinator.soak")
    parser.add_argument("--steps", type=int, default=200_000, help="steps of all worlds")
    parser.add_argument("--seed", type=int, default=None, help="random by default")
    parser.add_argument("--world", type=int, default=None, help="run only this world")
    parser.add_argument("--strategy", choices=STRATEGIES, default=None, help="random by default")
    parser.add_argument("--out", type=Path, help="file for the report of a successful run")
    options = parser.parse_args(arguments)
    soak = Soak(secrets.randbits(32) if options.seed is None else options.seed, options.strategy)
    print(f"seed {soak.seed}", flush=True)
    number = options.world or 0
    while soak.tally["steps"] < options.steps:
        try:
            soak.run(number)
        except Exception as error:
            print()
            # The notes of the error describe its world.
            traceback.print_exception(error, file=sys.stdout)
            print(
                f"python -m tests.coordinator.soak --seed {soak.seed} --world {number}"
                + (f" --strategy {options.strategy}" if options.strategy else "")
            )
            return 1
        number += 1
        print(f"\r{soak.tally['steps']} of {options.steps} steps", end="", flush=True)
        if options.world is not None:
            break
    print()
    text = report(soak.seed, options.steps, soak.tally)
    print(text)
    if options.out is not None:
        options.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
