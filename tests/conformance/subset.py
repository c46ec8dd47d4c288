# SPDX-License-Identifier: Apache-2.0
"""Select the part of vLLM's tests that the test command runs.

It has the tests of coordinators and of their callers. Left out are tests that fail without the
plugin, and tests that import other parts of vLLM, which takes long. `python -m tests.conformance`
runs all tests.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.conformance.releases import SUITE

FILES = tuple(
    f"{SUITE}/{name}.py"
    for name in (
        "prefix_cache/test_mamba_eagle_resume_checkpoint",
        "prefix_cache/test_partial_prefix_cache_hits",
        "prefix_cache/test_partial_prefix_cache_primitives",
        "test_async_scheduler",
        "test_contiguous_kv_packing",
        "test_deferred_block_free",
        "test_kv_cache_utils",
        "test_mamba_align_chunk_split",
        "test_prefix_caching",
        "test_prefix_replay",
        "test_scheduler",
        "test_single_type_kv_cache_manager",
        "test_swa_inflight_window_free",
        "test_worker_slot_overflow",
    )
)

SLOW = frozenset(
    f"{SUITE}/{test}"
    for test in (
        "test_kv_cache_utils.py::test_estimate_max_model_len",
        "test_kv_cache_utils.py::test_hisparse_pool_must_fit_max_model_len",
        "test_kv_cache_utils.py::test_is_kv_cache_spec_uniform",
        "test_prefix_caching.py::test_nixl_hisparse_full_block_import_keeps_a_writable_tail",
    )
)
"""Tests that take long and are skipped, as node ids without parameters."""

TESTS = {"0.32": 860, "0.33": 985}
"""How many tests of each minor must run. The number reveals tests that went missing."""

STOCK_FAILURES = Path(__file__).resolve().parent / "stock_failures.json"


def left_out(minor: str) -> frozenset[str]:
    """Return the node ids in `FILES` to skip. A node id without brackets skips all its cases."""
    failures: dict[str, list[str]] = json.loads(STOCK_FAILURES.read_text())
    return SLOW | frozenset(failures[minor])
