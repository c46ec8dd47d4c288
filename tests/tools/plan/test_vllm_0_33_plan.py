# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv plan` with the 0.33 wheel, whose planner has other modules and steps."""

import os
import subprocess
import sys

from testing.shapes import SHAPES
from tests.conformance.releases import CACHE, unpacked_wheel

# The wheel has no build for CPUs, so it finds no device.
COMMAND = """
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
vllm.platforms.current_platform = CpuPlatform()
from vllm_hybrid_kv.tools.main import app
app()
"""


def test_a_model_is_planned_with_vllm_0_33():
    arguments = ("plan", str(SHAPES["llama-3.1-8b"]), "--memory", "32GiB", "--device", "cpu")
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        env={
            **os.environ,
            "COLUMNS": "100",
            "PYTHONPATH": str(unpacked_wheel("0.33")),
            "VLLM_CACHE_ROOT": str(CACHE / "vllm-0.33-cache"),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "full attention" in done.stdout
    assert "tokens that vLLM reports" in done.stdout
