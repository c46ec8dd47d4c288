# SPDX-License-Identifier: Apache-2.0
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testing.virtual_environments import distribution


@pytest.fixture(autouse=True)
def _default_settings(default_settings: None) -> None:
    """Run every test of this folder with default settings."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Return a function that puts a package with an entry point for the plugin on `sys.path`."""
    added: list[str] = []

    def install(name: str, code: str) -> Path:
        folder, module = tmp_path / "site", f"{name}_kv"
        entry_points = f"[vllm_hybrid_kv]\n{name} = {module}\n"
        distribution(folder, f"{name}-kv", "1.5", entry_points, **{module: code})
        monkeypatch.syspath_prepend(str(folder))
        added.append(module)
        return folder

    yield install
    for module in added:
        sys.modules.pop(module, None)
