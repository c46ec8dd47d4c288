# SPDX-License-Identifier: Apache-2.0
"""What a soak came to, to be read later."""

from __future__ import annotations

from collections.abc import Mapping

from testing.machine import host


def report(seed: int, steps: int, tally: Mapping[str, int]) -> str:
    """Write a run that came to its end.

    Args:
        seed: Everything was drawn from it.
        steps: How many were asked for.
        tally: What happened, by name.
    """
    where = host()
    lines = [
        "# Random steps of vLLM's scheduler, everything checked after each",
        "",
        f"`python -m tests.coordinator.soak --steps {steps} --seed {seed}` came to its end: "
        "after every step reference counts, free list, hash map, tables and checkpoints agreed, "
        "and every token found in its blocks what it attends to, but in the worlds of stock that "
        f"are named. {where['cpu']}, {where['cpus']} CPUs, vLLM {where['vllm']}.",
        "",
        "| what happened | |",
        "|---|---|",
        *(f"| {name} | {count:,} |" for name, count in sorted(tally.items())),
    ]
    return "\n".join(lines) + "\n"
