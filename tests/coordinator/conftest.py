# SPDX-License-Identifier: Apache-2.0
import os
import sys
from pathlib import Path

import pytest

# `oracle` and `contents` are modules of these tests alone.
sys.path.insert(0, str(Path(__file__).parent))

EXPECTED_MINOR = "HYBRID_KV_TEST_VLLM_MINOR"


def pytest_configure() -> None:
    if EXPECTED_MINOR in os.environ:
        import vllm
        import vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        if not vllm.__version__.startswith(os.environ[EXPECTED_MINOR]):
            pytest.exit(f"this is vLLM {vllm.__version__} from {vllm.__file__}", returncode=4)
        # That wheel finds no device.
        vllm.platforms.current_platform = CpuPlatform()
