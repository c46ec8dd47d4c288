# SPDX-License-Identifier: Apache-2.0
"""The patch that names the option if the KV cache has fewer blocks than requests need states."""

from __future__ import annotations

import inspect
from typing import Any

from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.patches.base import MethodRebinding, Patch, PatchInfo, Target


def state_blocks_patch(resolve_cudagraph_mode: Target) -> Patch:
    """Replace vLLM's check that every request in decode has a block of states.

    `vllm-hybrid-kv plan` calls the same method, so that it refuses in the same words.

    Args:
        resolve_cudagraph_mode: `CompilationConfig.resolve_cudagraph_mode_and_sizes`.
    """

    def make(original: Any) -> Any:
        signature = inspect.signature(original)

        def resolve(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = signature.bind(self, *args, **kwargs)
            call.apply_defaults()
            requests, plan = call.arguments["max_num_reqs"], call.arguments["kv_cache_config"]
            # vLLM only uses it for the check that this one replaces.
            call.arguments["max_num_reqs"] = None
            mode = original(*call.args, **call.kwargs)
            if (
                requests is not None
                and plan is not None
                and plan.has_mamba_layers
                and not call.arguments["is_profiling"]
                and mode.has_full_cudagraphs()
                and requests > plan.num_blocks
            ):
                raise HybridKVError(
                    f"max_num_seqs ({requests}) exceeds available Mamba cache blocks "
                    f"({plan.num_blocks}): with full CUDA graphs every request in decode needs one "
                    f"for its states. Pass --max-num-seqs {plan.num_blocks}, or give the KV cache "
                    "more memory (gpu_memory_utilization)"
                )
            return mode

        return resolve

    return Patch(
        "state_blocks",
        PatchInfo(
            replaces="CompilationConfig.resolve_cudagraph_mode_and_sizes, which it wraps",
            why="vLLM's message names no option, and `plan` has to refuse in the words of a server",
            upstream="vllm-project/vllm#34094",
            until="vLLM names the option and its value",
        ),
        [MethodRebinding(resolve_cudagraph_mode, make)],
    )
