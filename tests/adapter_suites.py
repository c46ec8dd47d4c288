# SPDX-License-Identifier: Apache-2.0
"""List the tests that every supported vLLM minor must pass, and run them with an unpacked vLLM."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from testing.processes import run
from tests.conformance.releases import OUTER_VARIABLES, environment_of

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 1200


@dataclass(frozen=True)
class Suite:
    """Test files of one folder, and which of their tests to run.

    Attributes:
        folder: The folder in `tests/`.
        files: The files in the folder.
        selection: An expression for `-k`; empty for all tests.
        markers: An expression for `-m`; if empty, pytest's default.
        engines: Whether the tests start engines, which need vLLM's CPU platform.
    """

    folder: str
    files: tuple[str, ...]
    selection: str = ""
    markers: str = ""
    engines: bool = False


def arguments_of(suites: Sequence[Suite]) -> list[str]:
    """Return the pytest arguments that run suites with equal markers in one process."""
    selections = [
        f"(not ({' or '.join(suite.files)}) or ({suite.selection}))"
        for suite in suites
        if suite.selection
    ]
    (markers,) = {suite.markers for suite in suites}
    return [
        *(["-m", markers] if markers else []),
        *(["-k", " and ".join(selections)] if selections else []),
        *(str(HERE / suite.folder / file) for suite in suites for file in suite.files),
    ]


def run_suites(suites: Sequence[Suite], vllm: Path, minor: str) -> subprocess.CompletedProcess[str]:
    """Run suites with an unpacked vLLM instead of the installed one.

    Args:
        suites: The suites; their markers must be equal.
        vllm: The folder that contains the folder `vllm`.
        minor: The minor of that vLLM, such as `0.33`.
    """
    command = [sys.executable, "-m", "pytest", "-rA", "-q", "-p", "no:cacheprovider"]
    engines = any(suite.engines for suite in suites)
    return run(
        [*command, *arguments_of(suites)],
        cwd=HERE.parent,
        timeout_s=TIMEOUT_S,
        without=OUTER_VARIABLES,
        **environment_of(minor, vllm),
        **({"VLLM_TARGET_DEVICE": "cpu"} if engines else {}),
    )


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

TRANSFER = Suite("transfer", ("test_cpu_offloading.py", "test_transfer.py"))

PROMISES = Suite("planning", ("test_min_waste_properties.py",), "stock_or_lcm")

# Tests that compare with brute force run here with their first seed only. The installed vLLM runs
# all seeds.
COORDINATORS = Suite(
    "coordinator",
    (
        "test_block_map.py",
        "test_coordinator_strategies.py",
        "test_events.py",
        "test_explanation.py",
        "test_fixed_point.py",
        "test_observer.py",
        "test_pool_capacity.py",
        "test_smallest_hit.py",
    ),
    "not longest_prefix_that or [0]",
)

WINDOWS_AND_STATES = Suite("coordinator", ("test_hybrid_aware.py",), "windows")

GPU_BACKEND = Suite("attention", ("test_gpu_backend.py",), "not stock")

SUITES = (PLUGIN, PLANNING, TRANSFER, PROMISES, COORDINATORS, WINDOWS_AND_STATES, GPU_BACKEND)

# One model of each kind: full attention (Llama), a window (Gemma3), recurrent states (Qwen3-Next).
ENGINES = Suite(
    "e2e",
    (
        "test_file_tier.py",
        "test_greedy_output.py",
        "test_hybrid_prefix_cache.py",
        "test_metrics.py",
        "test_recall.py",
    ),
    selection=(
        "test_file_tier or (test_greedy_output and llama) or test_hybrid_prefix_cache"
        " or (test_metrics and not two) or (test_recall and gemma3)"
    ),
    markers="both_minors",
    engines=True,
)
