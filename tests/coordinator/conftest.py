# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Callable

import pytest

EXPECTED_MINOR = "HYBRID_KV_TEST_VLLM_MINOR"


def pytest_configure() -> None:
    if EXPECTED_MINOR in os.environ:
        import vllm
        import vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        if not vllm.__version__.startswith(os.environ[EXPECTED_MINOR]):
            pytest.exit(f"this is vLLM {vllm.__version__} from {vllm.__file__}", returncode=4)
        # The wheel of this vLLM minor detects no device.
        vllm.platforms.current_platform = CpuPlatform()


@pytest.fixture
def coordinator_setting(monkeypatch) -> Callable[[str], None]:
    """Return a function that selects a coordinator by environment, with the plugin registered."""
    from vllm_hybrid_kv import plugin
    from vllm_hybrid_kv.state import STATE

    def select(name: str) -> None:
        plugin.register()
        monkeypatch.setattr(STATE, "engine_settings", None)
        monkeypatch.setenv("VLLM_HYBRID_KV_COORDINATOR", name)

    return select
