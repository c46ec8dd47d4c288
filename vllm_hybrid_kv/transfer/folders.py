# SPDX-License-Identifier: Apache-2.0
"""Folders of stored pages, one for each fingerprint, with a file that says it in words.

vLLM's ExampleConnector keeps a prompt's pages in a folder named by the prompt's tokens. Of k8v4
pages these folders lie in one that is named by the fingerprint and by the process's part of the
model: nobody else looks there.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.transfer.fingerprint import PageFingerprint, fingerprint_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.hybrid_kv.transfer")

MANIFEST = "hybrid_kv.json"
"""Holds the fingerprint's fields, beside the pages."""

PREFIX = "hybrid_kv-"
"""What the folders' names begin with."""


def make_example_connector(original: Any) -> Any:
    """Return `ExampleConnector.__init__` that gives k8v4 pages a folder of their own.

    Args:
        original: vLLM's.
    """

    def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        fingerprint = fingerprint_of(vllm_config)
        if fingerprint is not None:
            parallel = vllm_config.parallel_config
            store = open_store(Path(self._storage_path), fingerprint)
            # The scheduler's connector has rank 0: it looks for the first process's pages.
            self._storage_path = str(store / f"{parallel.rank}of{parallel.world_size}")

    return init


def open_store(root: Path, fingerprint: PageFingerprint) -> Path:
    """Return the folder of a fingerprint in a store, and say once what else is in the store.

    Args:
        root: The folder that several engines share.
        fingerprint: Of this engine's pages.
    """
    own = root / f"{PREFIX}{fingerprint.digest}"
    if own not in STATE.opened_stores:
        own.mkdir(parents=True, exist_ok=True)
        _write(own / MANIFEST, fingerprint)
        STATE.opened_stores.add(own)
        for words in others(root, fingerprint):
            logger.warning(
                "%s holds pages that this engine does not read. They are: %s. Its own are: %s",
                root,
                words,
                fingerprint,
            )
    return own


def others(root: Path, fingerprint: PageFingerprint) -> list[str]:
    """Return what other pages a store holds, in words.

    Args:
        root: The store.
        fingerprint: Whose pages are not others.
    """
    found = []
    for manifest in sorted(root.glob(f"{PREFIX}*/{MANIFEST}")):
        try:
            words = str(json.loads(manifest.read_text())["words"])
        except (OSError, ValueError, KeyError, TypeError):
            words = f"unknown, for {manifest} cannot be read"
        if words != str(fingerprint):
            found.append(words)
    return found


def _write(manifest: Path, fingerprint: PageFingerprint) -> None:
    if manifest.exists():
        return
    # Whole or not at all: another process may read it at any time.
    handle, name = tempfile.mkstemp(dir=manifest.parent, prefix=".manifest-")
    with os.fdopen(handle, "w") as file:
        json.dump(fingerprint.fields(), file, indent=1)
    os.replace(name, manifest)
