# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv plan` beside the real 0.33 wheel, whose planner has another module and steps."""

import os
import subprocess
import sys

from testing.shapes import SHAPES
from tests.conformance.releases import CACHE, unpacked_wheel

# That wheel finds no device.
COMMAND = """
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
vllm.platforms.current_platform = CpuPlatform()
from vllm_hybrid_kv.tools.main import app
app()
"""


def test_a_model_is_planned_beside_the_0_33_wheel():
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
