# SPDX-License-Identifier: Apache-2.0
import os

import pytest

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
