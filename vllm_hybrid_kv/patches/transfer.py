# SPDX-License-Identifier: Apache-2.0
"""Patches of vLLM's KV connectors: fingerprints of k8v4 pages, and checkpoints in host memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_hybrid_kv.patches.context import Context
from vllm_hybrid_kv.patches.mechanism import Patch, check_sources
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.transfer.connectors import init_example_connector
from vllm_hybrid_kv.transfer.fingerprint import marked


def _append_fingerprint(original: Any, *args: Any, **kwargs: Any) -> str:
    return marked(original(*args, **kwargs))


def handshake_patch(context: Context) -> Patch:
    """Append the fingerprint to the hash that NIXL's peers exchange and compare."""
    return Patch(
        "handshake",
        replaces="compute_nixl_compatibility_hash, to whose result it adds the fingerprint",
        why="vLLM hashes the cache dtype and the backend's name, which do not differ for vLLM's "
        "own TurboQuant backend, although its pages differ",
        until="backends can describe the pages that they write",
        edits=[context.rebind("compute_nixl_compatibility_hash", _append_fingerprint)],
    )


def stored_pages_patch(context: Context) -> Patch:
    """Keep stored pages with different fingerprints apart."""

    def build_offloading_config(original: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        model = replace(config.model, dtype=marked(config.model.dtype))
        extra_config = config.extra_config
        if STATE.settings.coordinator == "hybrid_aware":
            # The states at the ends of answers are worth as much as those at the ends of prompts.
            extra_config = {"offload_prompt_only": False, **extra_config}
        return replace(config, model=model, extra_config=extra_config)

    return Patch(
        "stored_pages",
        replaces="resolve_none_hash_seed and build_offloading_config, to which it adds the "
        "fingerprint, and ExampleConnector.__init__, whose folder it replaces by a subfolder",
        why="blocks are looked up by their tokens, and stores are named by the cache dtype: a "
        "server without the plugin would read pages in another format",
        until="backends can describe the pages that they write",
        edits=[
            context.rebind("resolve_none_hash_seed", _append_fingerprint),
            context.rebind("build_offloading_config", build_offloading_config),
            context.rebind("ExampleConnector.__init__", init_example_connector),
        ],
    )


def cpu_offloading_patch(context: Context) -> Patch:
    """Let the OffloadingConnector run on CPUs."""

    def get_spec_cls(original: Any, *args: Any) -> Any:
        # Check and import late, because only engines with this connector need the modules.
        check_sources(context.offloading)
        from vllm_hybrid_kv.transfer.cpu_offloading import SPECS

        spec = original(*args)
        return SPECS.get(spec, spec)

    return Patch(
        "cpu_offloading",
        replaces="OffloadingSpecFactory.get_spec_cls, to replace the workers of vLLM's specs",
        why="the workers copy with CUDA streams, and a spec's name cannot be registered twice",
        until="vLLM's offloading specs have workers for CPUs",
        edits=[context.rebind("OffloadingSpecFactory.get_spec_cls", get_spec_cls)],
    )


def host_memory_patch(context: Context) -> Patch:
    """Make the OffloadingConnector store, find and evict the checkpoints of `hybrid_aware`."""

    def bind_kv_cache_manager(original: Any, self: Any, kv_cache_manager: Any) -> None:
        original(self, kv_cache_manager)
        if "OffloadingConnector" in [base.__name__ for base in type(self).mro()]:
            check_sources(context.offloading)
            from vllm_hybrid_kv.transfer.checkpoint_offloading import offload_checkpoints

            offload_checkpoints(self, kv_cache_manager.coordinator)

    return Patch(
        "host_memory",
        replaces="KVConnectorBase_V1.bind_kv_cache_manager, which it wraps",
        why="OffloadingConnector stores every full block, finds a state inside a block only next "
        "to a state at a block's end, and evicts single blocks",
        until="the scheduler side of the connector can be configured",
        edits=[context.rebind("KVConnectorBase_V1.bind_kv_cache_manager", bind_kv_cache_manager)],
    )
