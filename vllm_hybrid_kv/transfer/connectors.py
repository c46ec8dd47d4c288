# SPDX-License-Identifier: Apache-2.0
"""Checks that KV connectors can carry k8v4 pages, and chooses folders for ExampleConnector.

A connector can carry k8v4 pages if it copies whole pages, whatever their content, and detects peers
that cannot read them, by a fingerprint in its handshake, keys or folders. All other connectors of
vLLM are refused by name. Connectors of other packages cause a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, iter_layer_specs

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.planning.warnings import quantise_all
from vllm_hybrid_kv.settings import Settings
from vllm_hybrid_kv.transfer.fingerprint import fingerprint_of

logger = init_logger("vllm.hybrid_kv.transfer")

HANDSHAKE = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")
"""Connectors whose peers compare fingerprints before the first transfer."""

SUPPORTED = (*HANDSHAKE, "ExampleConnector", "OffloadingConnector", "SimpleCPUOffloadConnector")
"""Connectors that copy whole pages. `docs/deployment.md` says which of them were tested."""

SECONDARY_TIERS = "TieringOffloadingSpec"
"""The `spec_name` of OffloadingConnector with tiers behind host memory, such as files."""

CUDA_ONLY = "SimpleCPUOffloadConnector"
"""It copies with CUDA streams. On a CPU vLLM would fail after it loads the model."""

NO_HANDSHAKE = (
    "its peers do not compare page formats, and one without this plugin would read garbage"
)
RESHAPES = "it copies pages in the shape of separate keys and values, which k8v4 pages do not have"

REFUSED = {
    "DecodeBenchConnector": "it fills the cache with random numbers, which are not k8v4 pages",
    "FlexKVConnectorV1": RESHAPES,
    "HF3FSKVConnector": NO_HANDSHAKE,
    "HiSparseConnector": "it serves sparse attention, which k8v4 does not support",
    "LMCacheConnectorV1": RESHAPES,
    "LMCacheMPConnector": RESHAPES,
    "MoRIIOConnector": NO_HANDSHAKE,
    "MooncakeConnector": NO_HANDSHAKE,
    "MooncakeStoreConnector": "it is not tested with k8v4 pages",
}
"""vLLM's other connectors, and why they cannot carry k8v4 pages."""

MANIFEST = "hybrid_kv.json"
"""The file next to stored pages that holds the fields of their fingerprint."""

PREFIX = "hybrid_kv-"
"""The prefix of the names of folders with stored pages."""


def check_connectors(vllm_config: VllmConfig, *, on_cpu: bool) -> None:
    """Check that the connectors of an engine with a k8v4 cache can carry its pages.

    Raises:
        HybridKVError: A connector cannot carry them. The message says why, and what to do.
    """
    for name, module, options in _connectors(vllm_config):
        if module:
            logger.warning_once(
                "The KV connector %s of %s is not known to support %s pages. Use it only if it "
                "copies whole pages and all its peers run this plugin, because a peer without it "
                "would read garbage",
                name,
                module,
                CACHE_DTYPE,
            )
            continue
        if name in REFUSED:
            reason = (
                f"{REFUSED[name]}. Use one of {', '.join(SUPPORTED)}, or serve the model with "
                "--kv-cache-dtype auto"
            )
        elif name in HANDSHAKE and options.get("enforce_handshake_compat", True) is not True:
            reason = (
                "enforce_handshake_compat is off, so it would not check a peer's page format. "
                "Remove enforce_handshake_compat from its options"
            )
        elif on_cpu and name == CUDA_ONLY:
            reason = "it copies with CUDA streams, and this is a CPU. Use OffloadingConnector"
        elif name == "OffloadingConnector" and options.get("spec_name") == SECONDARY_TIERS:
            _check_tiers(
                options.get("secondary_tiers") or (),
                vllm_config.cache_config.prefix_caching_hash_algo,
            )
            continue
        else:
            continue
        raise HybridKVError(f"the KV connector {name} cannot carry {CACHE_DTYPE} pages: {reason}")


def _check_tiers(tiers: Iterable[Mapping[str, Any]], hash_algorithm: str) -> None:
    """Check secondary tiers, and create the folders of file tiers.

    Raises:
        HybridKVError: Keys would differ in the next process or could collide, or others can access
            a folder.
    """
    for tier in tiers:
        if not hash_algorithm.startswith("sha256"):
            raise HybridKVError(
                f"the secondary tier {tier.get('type')} of the OffloadingConnector outlives this "
                "process, so it needs sha256 hashes, but --prefix-caching-hash-algo is "
                f"{hash_algorithm}. Pass --prefix-caching-hash-algo sha256"
            )
        if tier.get("type") == "fs" and tier.get("root_dir"):
            _make_private(Path(tier["root_dir"]))


def _make_private(folder: Path) -> None:
    """Create a folder that only this user can access, or check that a folder is one.

    Raises:
        HybridKVError: Others can access the folder, or it cannot be created.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise HybridKVError(f"the root_dir of a file tier cannot be used: {error}") from error
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077 or found.st_uid != os.geteuid():
        raise HybridKVError(
            f"other users can access {folder}, the root_dir of a file tier: it has mode {mode:o} "
            f"and belongs to user {found.st_uid}. It will hold the contents of prompts. Run chmod "
            f"700 {folder}, or pass a folder that does not exist yet"
        )


def check_pages(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, settings: Settings
) -> None:
    """Check that NIXL can take the planned pages.

    If layers are adjacent in memory, NIXL splits the memory into pages without padding. If pages
    are padded, one of NIXL's assertions fails. Unquantised layers cause padding: their pages are
    padded to the size of the k8v4 pages.

    Raises:
        HybridKVError: A page is padded. The message names a layer, its bytes and what to set.
    """
    name = next((name for name, *_ in _connectors(vllm_config) if name in HANDSHAKE), None)
    for group in kv_cache_config.kv_cache_groups:
        # A single layer has its own memory, so its padding does no harm.
        if name is None or len(group.layer_names) == 1:
            continue
        for spec in iter_layer_specs(group.kv_cache_spec):
            if isinstance(spec, AttentionSpec) and spec.real_page_size_bytes < spec.page_size_bytes:
                advice = "serve the model with --kv-cache-dtype auto"
                if vllm_config.cache_config.kv_cache_dtype_skip_layers:
                    advice = f"{quantise_all(vllm_config, settings)}, or {advice}"
                raise HybridKVError(
                    f"the KV connector {name} cannot take pages that are padded, such as those of "
                    f"layer {group.layer_names[0]}, which use {spec.real_page_size_bytes:,} of "
                    f"{spec.page_size_bytes:,} bytes; {advice}"
                )


def _connectors(vllm_config: VllmConfig) -> Iterator[tuple[str, str | None, Mapping[str, Any]]]:
    """Yield each connector's name, its module (None if it is vLLM's own) and its options.

    Yield nothing without a k8v4 cache.
    """
    transfer = vllm_config.kv_transfer_config
    if vllm_config.cache_config.cache_dtype != CACHE_DTYPE or transfer is None:
        return
    options = transfer.kv_connector_extra_config or {}
    if transfer.kv_connector == "MultiConnector":
        for child in options.get("connectors", []):
            extra = child.get("kv_connector_extra_config") or {}
            yield str(child.get("kv_connector")), child.get("kv_connector_module_path"), extra
    elif transfer.kv_connector is not None:
        yield transfer.kv_connector, transfer.kv_connector_module_path, options


def init_example_connector(
    original: Any, self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any
) -> None:
    """Give k8v4 pages their own folder. `original` is `ExampleConnector.__init__`.

    ExampleConnector stores a prompt's pages in a folder named after the prompt's tokens. With k8v4
    pages these folders are inside a folder named after the fingerprint and the rank. Engines with
    other pages do not read that folder. Log once if the store holds other pages.
    """
    original(self, vllm_config, *args, **kwargs)
    if (fingerprint := fingerprint_of(vllm_config)) is None:
        return
    root, words = Path(self._storage_path), str(fingerprint)
    own = root / f"{PREFIX}{hashlib.sha256(words.encode()).hexdigest()[:16]}"
    own.mkdir(parents=True, exist_ok=True)
    # Replace the file atomically, because another process may read it at any time.
    part = own / f".{MANIFEST}-{os.getpid()}"
    part.write_text(json.dumps({**asdict(fingerprint), "words": words}, indent=1))
    part.replace(own / MANIFEST)
    if others := [path for path in root.glob(f"{PREFIX}*/{MANIFEST}") if path.parent != own]:
        logger.warning_once(
            "%s holds pages that this engine does not read: %s. Delete them, or use another "
            "folder. This engine uses: %s",
            str(root),
            "; ".join(f"{path.parent} ({_words_of(path)})" for path in sorted(others)),
            words,
        )
    parallel = vllm_config.parallel_config
    # The connector in the scheduler has rank 0, so it looks for the pages of the first worker.
    self._storage_path = str(own / f"{parallel.rank}of{parallel.world_size}")


def _words_of(manifest: Path) -> str:
    """Read the fingerprint of stored pages from their manifest, in words for a message."""
    try:
        return str(json.loads(manifest.read_text())["words"])
    except (OSError, ValueError, LookupError, TypeError):
        return "of an unknown format"
