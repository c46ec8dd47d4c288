# SPDX-License-Identifier: Apache-2.0
"""Worlds one after the other, from one seed."""

from __future__ import annotations

from collections import Counter

from tests.coordinator.soak.worker import ChainedCopyError, SoakError
from tests.coordinator.soak.world import World

COPIED = "worlds of stock that ended with a block copied before it was written"
WRONG = "worlds of stock that ended with something else wrong"

WORLD_STEPS = 500
"""Steps of a world before its requests are ended."""


class Soak:
    """Worlds one after the other.

    Attributes:
        tally: What happened in all of them, by name.
    """

    def __init__(self, seed: int, strategy: str | None = None) -> None:
        """Prepare.

        Args:
            seed: Everything is drawn from it.
            strategy: The coordinator's; None draws one for each world.
        """
        self.seed = seed
        self.tally: Counter[str] = Counter()
        self._strategy = strategy

    def run(self, number: int, steps: int = WORLD_STEPS) -> None:
        """Run one world.

        Args:
            number: Which one.
            steps: How many steps it takes before its requests are ended.

        Raises:
            SoakError: Something does not agree.
        """
        world = World(f"{self.seed}/{number}", self._strategy)
        try:
            world.run(steps)
        except Exception as error:
            if not isinstance(error, SoakError) or world.plan.strategy != "stock":
                error.add_note(
                    f"Seed {self.seed}, world {number}, step {world.tally['steps']}: {world.plan}"
                )
                raise
            # vLLM's own coordinator copies blocks before they are written, see
            # `upstream_fixes.StepWrites`. Its other faults are out of scope.
            chained = isinstance(error, ChainedCopyError)
            self.tally[COPIED if chained else WRONG] += 1
        self.tally += world.tally
        self.tally["worlds"] += 1
        self.tally[f"worlds of {world.plan.strategy}"] += 1
