# SPDX-License-Identifier: Apache-2.0
"""The patches that put the fingerprint of k8v4 pages into what vLLM's connectors compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm_hybrid_kv.patches.base import FunctionRebinding, MethodRebinding, Patch, PatchInfo, Target
from vllm_hybrid_kv.transfer.connectors import make_example_connector
from vllm_hybrid_kv.transfer.fingerprint import marked


def handshake_patch(compatibility_hash: Target) -> Patch:
    """Have NIXL's peers compare fingerprints.

    The words stand behind vLLM's own hash, and its message shows both sides', so that a peer
    without the plugin refuses in words, too.

    Args:
        compatibility_hash: `compute_nixl_compatibility_hash`.
    """

    def make(original: Any) -> Any:
        def compute_nixl_compatibility_hash(*args: Any, **kwargs: Any) -> str:
            return marked(original(*args, **kwargs))

        return compute_nixl_compatibility_hash

    return Patch(
        "handshake",
        PatchInfo(
            replaces="compute_nixl_compatibility_hash, to whose result it adds the fingerprint",
            why="of the cache it hashes the dtype and a name of a backend, which are the same for "
            "vLLM's own TurboQuant, whose pages are others",
            upstream="none known",
            until="backends can say what the pages they write are",
        ),
        [FunctionRebinding(compatibility_hash, make)],
    )


def stored_pages_patch(
    none_hash_seed: Target, offloading_config: Target, init_example_connector: Target
) -> Patch:
    """Keep stored pages apart by fingerprint.

    Args:
        none_hash_seed: `resolve_none_hash_seed`, from which the hashes of all blocks follow.
        offloading_config: `build_offloading_config`, which names stored pages.
        init_example_connector: `ExampleConnector.__init__`, which chooses a folder.
    """

    def make_seed(original: Any) -> Any:
        def resolve_none_hash_seed(*args: Any, **kwargs: Any) -> str:
            return marked(original(*args, **kwargs))

        return resolve_none_hash_seed

    def make_config(original: Any) -> Any:
        def build_offloading_config(*args: Any, **kwargs: Any) -> Any:
            config = original(*args, **kwargs)
            model = replace(config.model, dtype=marked(config.model.dtype))
            return replace(config, model=model)

        return build_offloading_config

    return Patch(
        "stored_pages",
        PatchInfo(
            replaces="resolve_none_hash_seed and build_offloading_config, to which it adds the "
            "fingerprint, and ExampleConnector.__init__, whose folder it replaces by one inside it",
            why="blocks are looked up by their tokens, and stores named by the cache dtype: a "
            "server without the plugin finds pages there that it cannot read",
            upstream="none known",
            until="backends can say what the pages they write are",
        ),
        [
            FunctionRebinding(none_hash_seed, make_seed),
            FunctionRebinding(offloading_config, make_config),
            MethodRebinding(init_example_connector, make_example_connector),
        ],
    )
