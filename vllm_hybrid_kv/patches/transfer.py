# SPDX-License-Identifier: Apache-2.0
"""Patches that make vLLM's KV connectors compare the fingerprint of k8v4 pages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_hybrid_kv.patches.context import Context
from vllm_hybrid_kv.patches.mechanism import Patch
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
        return replace(config, model=model)

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
