# SPDX-License-Identifier: Apache-2.0
"""The tests that an adapter has to pass beside a vLLM that is unpacked and not installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Suite:
    """Files of one folder, which one run of pytest takes.

    Attributes:
        folder: In `tests/`.
        files: In the folder.
        selection: An expression for `-k`; empty for all tests.
        markers: An expression for `-m`; pytest's own default if empty.
        engines: Whether the tests start engines, which need vLLM's CPU platform.
    """

    folder: str
    files: tuple[str, ...]
    selection: str = ""
    markers: str = ""
    engines: bool = False

    def arguments(self) -> list[str]:
        """Return what pytest is given."""
        selection = ["-k", self.selection] if self.selection else []
        markers = ["-m", self.markers] if self.markers else []
        return [*selection, *markers, *(str(HERE / self.folder / file) for file in self.files)]


def arguments_of(suites: Sequence[Suite]) -> list[str]:
    """Return what pytest is given to run suites without markers in one process."""
    selections = [
        f"(not ({' or '.join(suite.files)}) or ({suite.selection}))"
        for suite in suites
        if suite.selection
    ]
    files = [str(HERE / suite.folder / file) for suite in suites for file in suite.files]
    return ["-k", " and ".join(selections), *files]


PLUGIN = Suite(
    "plugin",
    (
        "test_gate.py",
        "test_gpu_platform.py",
        "test_patches.py",
        "test_selection.py",
        "test_startup_refusals.py",
        "test_strategies.py",
    ),
)

PLANNING = Suite(
    "planning",
    (
        "test_boundary_layers.py",
        "test_capacity.py",
        "test_min_waste.py",
        "test_page_sizes.py",
        "test_pages_in_the_worker.py",
        "test_startup_warnings.py",
        "test_state_blocks.py",
    ),
)

TRANSFER = Suite("transfer", ("test_transfer.py",))

PROMISES = Suite("planning", ("test_min_waste_properties.py",), "stock_or_lcm")

# Of the random cases a part; the rest runs against the installed vLLM.
COORDINATORS = Suite(
    "coordinator",
    (
        "test_block_map.py",
        "test_coordinator_strategies.py",
        "test_explanation.py",
        "test_fixed_point.py",
        "test_fixed_point_oracle.py",
        "test_observer.py",
        "test_pool_capacity.py",
        "test_smallest_hit.py",
    ),
    "not oracle or [0]",
)

GPU_BACKEND = Suite("attention", ("test_gpu_backend.py",), "not stock")

SUITES = (PLUGIN, PLANNING, TRANSFER, PROMISES, COORDINATORS, GPU_BACKEND)

# One model of each kind: Llama, a window (Gemma3) and recurrent states (Qwen3-Next).
ENGINES = Suite(
    "e2e",
    (
        "test_greedy_output.py",
        "test_hybrid_prefix_cache.py",
        "test_metrics.py",
        "test_recall.py",
    ),
    selection=(
        "(test_greedy_output and llama) or test_hybrid_prefix_cache"
        " or (test_metrics and not two) or (test_recall and gemma3)"
    ),
    markers="both_minors",
    engines=True,
)
