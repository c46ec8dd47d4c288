# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest that gives a minor an adapter which the package does not have for it."""

import os

from vllm_hybrid_kv import patches


def pytest_configure() -> None:
    lend()


def lend() -> None:
    """Enter the adapter that the environment names."""
    minor, module = os.environ["HYBRID_KV_DRIFT_ADAPTER"].split("=")
    major, _, rest = minor.partition(".")
    patches.ADAPTERS[int(major), int(rest)] = module
