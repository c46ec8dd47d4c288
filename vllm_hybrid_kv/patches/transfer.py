# SPDX-License-Identifier: Apache-2.0
"""The patches that add the fingerprint of k8v4 pages to what vLLM's connectors compare."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.patches.mechanism import Patch, PatchInfo, Rebinding
from vllm_hybrid_kv.transfer.connectors import make_example_connector
from vllm_hybrid_kv.transfer.fingerprint import marked

if TYPE_CHECKING:
    from vllm_hybrid_kv.patches.context import Context


def _make_marked(original: Any) -> Any:
    """Return a function that appends the fingerprint to the original's text."""

    def with_fingerprint(*args: Any, **kwargs: Any) -> str:
        return marked(original(*args, **kwargs))

    return with_fingerprint


def handshake_patch(context: Context) -> Patch:
    """Make NIXL's peers compare fingerprints.

    The fingerprint follows vLLM's own hash in words. vLLM's message shows both sides', so a peer
    without the plugin names the difference as well.
    """
    return Patch(
        "handshake",
        PatchInfo(
            replaces="compute_nixl_compatibility_hash, to whose result it adds the fingerprint",
            why="it hashes the cache dtype and the backend's name, which are the same for vLLM's "
            "own TurboQuant, whose pages are different",
            upstream="none known",
            until="backends can describe the pages that they write",
        ),
        [Rebinding(context.targets["compute_nixl_compatibility_hash"], _make_marked)],
    )


def stored_pages_patch(context: Context) -> Patch:
    """Separate stored pages by fingerprint.

    The patched functions are the seed of all block hashes, the name of pages in offloading, and
    the folder of ExampleConnector.
    """

    def make_config(original: Any) -> Any:
        def build_offloading_config(*args: Any, **kwargs: Any) -> Any:
            config = original(*args, **kwargs)
            model = replace(config.model, dtype=marked(config.model.dtype))
            return replace(config, model=model)

        return build_offloading_config

    targets = context.targets
    return Patch(
        "stored_pages",
        PatchInfo(
            replaces="resolve_none_hash_seed and build_offloading_config, to which it adds the "
            "fingerprint, and ExampleConnector.__init__, whose folder it replaces by a subfolder",
            why="blocks are looked up by their tokens, and stores are named by the cache dtype: a "
            "server without the plugin would read pages in another format",
            upstream="none known",
            until="backends can describe the pages that they write",
        ),
        [
            Rebinding(targets["resolve_none_hash_seed"], _make_marked),
            Rebinding(targets["build_offloading_config"], make_config),
            Rebinding(targets["ExampleConnector.__init__"], make_example_connector),
        ],
    )
