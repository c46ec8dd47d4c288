# SPDX-License-Identifier: Apache-2.0
"""All processes of an engine have the same plugin, or none of them starts.

A worker in which the plugin is inactive, where it is active in the others, would run vLLM's own
backend over pages that the plans of the others describe. So the process that the user started
leaves what it has in the environment, and the processes that it starts compare.
"""

from __future__ import annotations

import multiprocessing
import os

from vllm_hybrid_kv.errors import HybridKVAgreementError

VARIABLE = "HYBRID_KV_STARTED_BY"
"""What the starting process has, in words. Not among the settings, nor one of vLLM's variables."""


def agree(here: str) -> None:
    """Compare what this process has with what the process has that started it.

    One that was started by itself, as Ray's workers are, or that has another engine's variable by
    chance, is one to compare with from then on.

    Args:
        here: Which plugin on which vLLM, and whether it is active.

    Raises:
        HybridKVAgreementError: They differ.
    """
    there = os.environ.get(VARIABLE)
    if multiprocessing.parent_process() is None or not there:
        os.environ[VARIABLE] = here
    elif here != there:
        raise HybridKVAgreementError(
            f"the process {multiprocessing.current_process().name} has {here}, and the one that "
            f"started it {there}. An engine's processes must all have the same; another plugin or "
            "a patch may be in one of them only: `vllm-hybrid-kv doctor` says what is patched"
        )
