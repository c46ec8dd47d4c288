# SPDX-License-Identifier: Apache-2.0
"""The coordinators against the real 0.33 wheel, in a process that sees it instead of 0.32."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conformance.releases import CACHE, unpacked_wheel

HERE = Path(__file__).resolve().parent
SUITES = (
    "test_block_map.py",
    "test_coordinator_strategies.py",
    "test_explanation.py",
    "test_fixed_point.py",
    "test_fixed_point_oracle.py",
    "test_pool_capacity.py",
    "test_smallest_hit.py",
)


def test_the_coordinators_suites_pass_against_the_0_33_wheel():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            # Of the random cases a part; the rest runs against the installed vLLM.
            *("-k", "not oracle or [0]"),
            *(str(HERE / suite) for suite in SUITES),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(unpacked_wheel("0.33")),
            "VLLM_CACHE_ROOT": str(CACHE / "vllm-0.33-cache"),
            "HYBRID_KV_TEST_VLLM_MINOR": "0.33",
        },
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
