# SPDX-License-Identifier: Apache-2.0
"""Which of vLLM's KV connectors can carry k8v4 pages, said before an engine starts.

A connector carries them if it copies pages whole, whatever is in them, and if a peer that cannot
read them finds out: by a handshake, by keys or by folders that hold the fingerprint. The others
are refused by name. Those of other packages are not known here; of them a warning says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, iter_layer_specs

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.errors import HybridKVError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.hybrid_kv.transfer")

HANDSHAKE = ("NixlConnector", "NixlPullConnector", "NixlPushConnector")
"""Their peers compare fingerprints before the first page crosses."""

CARRIERS = (*HANDSHAKE, "ExampleConnector", "OffloadingConnector", "SimpleCPUOffloadConnector")
"""Copy whole pages; `docs/scaling.md` says which of them ran here and which were only read."""

GPU_ONLY = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""Copy between a GPU and the machine's memory: on CPUs vLLM ends once the model is loaded."""

UNMARKED = "its peers do not compare page formats, and one without this plugin would read garbage"
RESHAPES = "it copies pages by the shape of a cache of keys and values, which a k8v4 page has not"

REFUSED = {
    "DecodeBenchConnector": "it fills the cache with random numbers, which are no k8v4 pages",
    "FlexKVConnectorV1": RESHAPES,
    "HF3FSKVConnector": UNMARKED,
    "HiSparseConnector": "it serves sparse attention, which k8v4 does not",
    "LMCacheConnectorV1": RESHAPES,
    "LMCacheMPConnector": RESHAPES,
    "MoRIIOConnector": UNMARKED,
    "MooncakeConnector": UNMARKED,
    "MooncakeStoreConnector": "nobody has tried whether it copies them whole",
}
"""vLLM's other connectors, and why they cannot carry k8v4 pages."""


WITHOUT_PAGES = ("ExampleHiddenStatesConnector",)
"""Carries hidden states, and no page."""


def check_connectors(vllm_config: VllmConfig, *, on_cpu: bool) -> None:
    """Stop where an engine with a k8v4 cache has a connector that cannot carry its pages.

    Args:
        vllm_config: The engine's.
        on_cpu: Whether it runs on a CPU.

    Raises:
        HybridKVError: It has; the message says why and what carries them.
    """
    transfer = vllm_config.kv_transfer_config
    if vllm_config.cache_config.cache_dtype != CACHE_DTYPE or transfer is None:
        return
    for name, module, extra in _connectors(transfer):
        if module:
            logger.warning_once(
                "Of the KV connector %s of %s nothing is known: it carries %s pages only if it "
                "copies them whole, and nothing keeps peers of another format from reading them",
                name,
                module,
                CACHE_DTYPE,
            )
        elif (reason := _refusal(name, extra, on_cpu=on_cpu)) is not None:
            raise HybridKVError(
                f"the KV connector {name} cannot carry {CACHE_DTYPE} pages: {reason}. "
                f"{_way_out(name)}"
            )


def check_pages(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, boundary_layers: int
) -> None:
    """Stop where pages are planned that NIXL cannot take.

    It cuts memory in which layers lie one after another into pages by what attention reads of it,
    and fails an assertion where that is less than a page.

    Args:
        vllm_config: The engine's.
        kv_cache_config: The plan.
        boundary_layers: The setting: unquantised layers at either end, whose pages are padded to
            those of the others.

    Raises:
        HybridKVError: The message names the layer, its bytes and what to set.
    """
    transfer = vllm_config.kv_transfer_config
    if vllm_config.cache_config.cache_dtype != CACHE_DTYPE or transfer is None:
        return
    name = next((name for name, *_ in _connectors(transfer) if name in HANDSHAKE), None)
    if name is None:
        return
    # One layer alone has its memory for itself.
    groups = [group for group in kv_cache_config.kv_cache_groups if len(group.layer_names) > 1]
    for group in groups:
        for spec in iter_layer_specs(group.kv_cache_spec):
            if isinstance(spec, AttentionSpec) and spec.real_page_size_bytes < spec.page_size_bytes:
                way_out = "serve the model with --kv-cache-dtype auto"
                if boundary_layers:
                    way_out = f"set boundary_layers, which is {boundary_layers}, to 0, or {way_out}"
                raise HybridKVError(
                    f"the KV connector {name} cannot take pages that are padded, as those of "
                    f"layer {group.layer_names[0]} are: {spec.real_page_size_bytes:,} bytes in "
                    f"{spec.page_size_bytes:,}; {way_out}"
                )


def _connectors(transfer: Any) -> Iterator[tuple[str, str | None, Mapping[str, Any]]]:
    """Yield the name, the module if it is not vLLM's, and the options of each connector."""
    if transfer.kv_connector is None:
        return
    if transfer.kv_connector != "MultiConnector":
        extra = transfer.kv_connector_extra_config or {}
        yield transfer.kv_connector, transfer.kv_connector_module_path, extra
        return
    for child in transfer.kv_connector_extra_config.get("connectors", []):
        extra = child.get("kv_connector_extra_config") or {}
        yield str(child.get("kv_connector")), child.get("kv_connector_module_path"), extra


def _refusal(name: str, extra: Mapping[str, Any], *, on_cpu: bool) -> str | None:
    if name in REFUSED:
        return REFUSED[name]
    if name in HANDSHAKE and extra.get("enforce_handshake_compat", True) is not True:
        return "enforce_handshake_compat is switched off, by which a peer's page format is checked"
    if on_cpu and name in GPU_ONLY and not extra.get("spec_module_path"):
        return "it copies between a GPU and the machine's memory, and this is a CPU"
    return None


def _way_out(name: str) -> str:
    if name in HANDSHAKE:
        return "Leave enforce_handshake_compat as it is"
    if name in GPU_ONLY:
        return "Leave it out: the cache is in the machine's memory already"
    return f"Use one of {', '.join(CARRIERS)}, or serve the model with --kv-cache-dtype auto"
