# SPDX-License-Identifier: Apache-2.0
"""The coordinators against the real 0.33 wheel, in a process that sees it instead of 0.32."""

import os
import subprocess
import sys

from tests.adapter_suites import COORDINATORS
from tests.conformance.releases import CACHE, unpacked_wheel


def test_the_coordinators_suites_pass_against_the_0_33_wheel():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *COORDINATORS.arguments(),
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
