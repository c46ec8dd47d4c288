# SPDX-License-Identifier: Apache-2.0
"""What an adapter knows of its vLLM minor, and the patches that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_hybrid_kv.patches import (
    attention,
    block_alignment,
    boundary,
    configuration,
    coordination,
    cuda_graphs,
    layers,
    planning,
    sampling,
    startup,
    transfer,
)
from vllm_hybrid_kv.patches.base import Patch, Target
from vllm_hybrid_kv.patches.context import Context


@dataclass(frozen=True)
class Targets:
    """Where one vLLM minor has what the patches rebind, and what it must look like.

    Attributes:
        get_groups: Splits layers into KV groups.
        unify: Makes page sizes equal.
        get_capacity: Computes the reported capacity.
        make_coordinator: Makes the coordinator.
        init_kv_cache_manager: Initialises the manager that has the coordinator made.
        resolve_block_sizes: Computes the scheduler's and the hashes' block size.
        copy_blocks: Copies blocks at the start of a step.
        create_engine_config: Makes the configuration from the arguments.
        init_worker: Initialises any worker.
        validate_environ: Warns of unknown variables.
        get_attn_backend_cls: Selects an attention backend on CPUs.
        select_backend: Selects an attention backend on any device, cached.
        get_boundary_layers: Names the layers at each end that stay unquantised.
        verify_gemma4_config: Chooses a backend for models with heads of several sizes.
        nixl_compatibility_hash: Computes what NIXL's peers compare.
        none_hash_seed: Resolves what the hashes of blocks begin with.
        offloading_config: Names stored pages for offloading.
        init_example_connector: Chooses the folder that ExampleConnector keeps pages in.
        cpu_refuses_dtypes: Whether the CPU platform refuses cache dtypes that it cannot store.
        align_chunks: Ends chunks of prompts where states are cached. Checked, not patched.
        cache_prompt_end: Caches the state at a prompt's end. Checked, not patched.
        add_to_batch: Adds a request to the worker's batch.
        init_attention: Builds an attention layer.
        initialize_model: Builds a model's layers.
        initialize_from_config: Gives a worker its plan of the KV cache.
        align_hybrid: Aligns blocks of hybrid models.
        align_heterogeneous: Aligns blocks of layers with several cache dtypes.
        resolve_cudagraph_mode: Chooses CUDA graphs, and checks the plan for them.
        wait_for_engines: Waits until the engine cores have started.
    """

    get_groups: Target
    unify: Target
    get_capacity: Target
    make_coordinator: Target
    init_kv_cache_manager: Target
    resolve_block_sizes: Target
    copy_blocks: Target
    create_engine_config: Target
    init_worker: Target
    validate_environ: Target
    get_attn_backend_cls: Target
    select_backend: Target
    get_boundary_layers: Target
    verify_gemma4_config: Target
    nixl_compatibility_hash: Target
    none_hash_seed: Target
    offloading_config: Target
    init_example_connector: Target
    cpu_refuses_dtypes: bool
    align_chunks: Target
    cache_prompt_end: Target
    add_to_batch: Target
    init_attention: Target
    initialize_model: Target
    initialize_from_config: Target
    align_hybrid: Target
    align_heterogeneous: Target
    resolve_cudagraph_mode: Target
    wait_for_engines: Target


def build(context: Context, known: Targets) -> list[Patch]:
    """Return the patches of a minor, not applied.

    On other devices than CPUs and GPUs vLLM's own TURBOQUANT backend stays. On GPUs vLLM selects
    ours by itself, through what the class says that it supports.
    """
    patches = [
        configuration.settings_patch(context, known.create_engine_config, known.init_worker),
        configuration.known_variables_patch(known.validate_environ),
        planning.page_size_patch(context, known.get_groups, known.unify),
        planning.capacity_patch(context, known.get_capacity),
        coordination.coordinator_patch(
            context,
            known.make_coordinator,
            known.init_kv_cache_manager,
            [known.align_chunks, known.cache_prompt_end],
        ),
        coordination.prefix_match_unit_patch(context, known.resolve_block_sizes),
        coordination.block_copies_patch(known.copy_blocks),
        cuda_graphs.state_blocks_patch(known.resolve_cudagraph_mode),
        startup.startup_patch(context, known.wait_for_engines),
    ]
    if context.on_cpu or context.on_gpu:
        patches += [
            boundary.boundary_patch(context, known.get_boundary_layers),
            attention.registration_patch(context),
            attention.refusal_patch(known.select_backend),
            transfer.handshake_patch(known.nixl_compatibility_hash),
            transfer.stored_pages_patch(
                known.none_hash_seed, known.offloading_config, known.init_example_connector
            ),
            layers.layer_dtype_patch(known.init_attention),
            layers.built_model_patch(known.initialize_model),
            layers.layer_pages_patch(known.initialize_from_config),
            block_alignment.block_alignment_patch(known.align_hybrid, known.align_heterogeneous),
        ]
    if context.on_gpu:
        patches.append(attention.several_head_sizes_patch(known.verify_gemma4_config))
    if context.on_cpu:
        patches.append(sampling.seeded_sampling_patch(known.add_to_batch))
        patches.append(
            attention.selection_patch(
                known.get_attn_backend_cls, stock_refuses=known.cpu_refuses_dtypes
            )
        )
    return patches
