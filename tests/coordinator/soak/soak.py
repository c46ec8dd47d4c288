# SPDX-License-Identifier: Apache-2.0
"""Run worlds one after another, from one seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from benchmarks import markdown
from testing.machine import host
from tests.coordinator.soak.worker import ChainedCopyError, SoakError
from tests.coordinator.soak.world import World

COPIED = "worlds of stock that ended with a block copied before it was written"
WRONG = "worlds of stock that ended with something else wrong"

WORLD_STEPS = 500
"""How many steps a world runs before it ends its requests."""


class Soak:
    """Runs worlds and counts the events in all of them (`tally`)."""

    def __init__(self, seed: int, strategy: str | None = None, offload: bool = False) -> None:
        """Run all worlds with one coordinator strategy. By default, each world draws its own.

        With `offload`, all have vLLM's OffloadingConnector and `hybrid_aware`.
        """
        self.seed = seed
        self.tally: Counter[str] = Counter()
        self._strategy = strategy
        self._offload = offload

    def run(self, number: int, steps: int = WORLD_STEPS) -> None:
        """Run world `number` for some steps, and then until its requests end."""
        world = World(f"{self.seed}/{number}", self._strategy, self._offload)
        try:
            world.run(steps)
        except Exception as error:
            if not isinstance(error, SoakError) or world.plan.strategy != "stock":
                error.add_note(
                    f"Seed {self.seed}, world {number}, step {world.tally['steps']}: {world.plan}"
                )
                raise
            # vLLM's own coordinator may copy blocks before they are written (see
            # `upstream_fixes.StepWrites`). Its other faults are out of scope.
            chained = isinstance(error, ChainedCopyError)
            self.tally[COPIED if chained else WRONG] += 1
        self.tally += world.tally
        self.tally["worlds"] += 1
        self.tally[f"worlds of {world.plan.strategy}"] += 1


def report(seed: int, steps: int, tally: Mapping[str, int]) -> str:
    """Describe a successful run in Markdown: its command, machine and event counts."""
    lines = [
        "# Random steps of vLLM's scheduler, checked after each step",
        "",
        f"`python -m tests.coordinator.soak --steps {steps} --seed {seed}` succeeded. After every "
        "step reference counts, free list, hash map, tables and checkpoints were consistent, and "
        "every token found in its blocks what it attends to, except in the listed worlds of stock. "
        f"{markdown.machine(host())}.",
        "",
        *markdown.table(
            ["event", "count"], [[name, f"{count:,}"] for name, count in sorted(tally.items())]
        ),
    ]
    return "\n".join(lines) + "\n"
