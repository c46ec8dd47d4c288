# SPDX-License-Identifier: Apache-2.0
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The demo and the benchmarks are run from the repository's root and are not installed.
sys.path.insert(0, str(ROOT))

# Read by vLLM and by huggingface_hub when they are imported: no test asks the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# Read by OpenMP when torch is imported, here and in processes that tests start. Its threads else
# spin where they wait for one that has no core, and keep it from getting one.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

LONGEST = {"e2e", "test_machine_code.py", "test_real_engines.py", "test_vllm_0_33.py"}
"""Folders and files whose tests take a minute or more in one file."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the processes of `pytest -n` take the longest files first, so that they end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONGEST.isdisjoint(item.path.parts))
