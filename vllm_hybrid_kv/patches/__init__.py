# SPDX-License-Identifier: Apache-2.0
"""The patches of vLLM: one table of target functions, and one module for each concern."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_hybrid_kv.patches.context import Context
    from vllm_hybrid_kv.patches.mechanism import Patch


def patches_for(context: Context) -> list[Patch]:
    """Return the patches for a process, without applying them.

    On devices other than CPUs and GPUs, vLLM keeps its own TURBOQUANT backend. On GPUs vLLM selects
    our backend without a patch, because it asks the backend class what the class supports.
    """
    from vllm_hybrid_kv.patches import (
        attention,
        configuration,
        coordination,
        layers,
        planning,
        sampling,
        startup,
        transfer,
    )

    makers: list[Callable[[Context], Patch]] = [
        configuration.settings_patch,
        configuration.known_variables_patch,
        planning.page_size_patch,
        planning.capacity_patch,
        planning.state_blocks_patch,
        coordination.coordinator_patch,
        coordination.prefix_match_unit_patch,
        coordination.block_copies_patch,
        transfer.host_memory_patch,
        startup.startup_patch,
    ]
    if context.on_cpu or context.on_gpu:
        makers += [
            layers.boundary_patch,
            attention.registration_patch,
            attention.refusal_patch,
            attention.gemma4_heads_patch,
            transfer.handshake_patch,
            transfer.stored_pages_patch,
            layers.layer_dtype_patch,
            layers.built_model_patch,
            layers.layer_pages_patch,
            planning.block_alignment_patch,
        ]
    if context.on_cpu:
        makers += [
            sampling.seeded_sampling_patch,
            attention.selection_patch,
            transfer.cpu_offloading_patch,
        ]
    return [make(context) for make in makers]
