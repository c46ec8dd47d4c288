# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import pytest


@pytest.fixture
def coordinator_setting(monkeypatch) -> Callable[[str], None]:
    """Return a function that registers the plugin and selects a coordinator strategy."""
    from vllm_hybrid_kv import plugin
    from vllm_hybrid_kv.state import STATE

    def select(name: str) -> None:
        plugin.register()
        monkeypatch.setattr(STATE, "engine_settings", None)
        monkeypatch.setenv("VLLM_HYBRID_KV_COORDINATOR", name)

    return select
