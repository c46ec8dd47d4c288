# SPDX-License-Identifier: Apache-2.0
"""The fingerprint that travels with k8v4 pages, so that no engine reads pages of another format.

Two engines read the same numbers from a page only if page format, arrangement, size and heads are
equal. A page has no header that would show a difference, so the fingerprint states these properties
in words. It is part of vLLM's handshakes, keys and folders, so an error shows both fingerprints.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.settings import INTERPRETER
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.version import __version__


@dataclass(frozen=True)
class PageFingerprint:
    """The properties that two engines must share to read each other's pages.

    The number of KV heads is that of the whole model. vLLM itself compares how many KV heads each
    tensor-parallel process holds, and splits pages between heads, never inside a head.

    Attributes:
        plugin: Version of the package that wrote the pages.
        page_format: Version of the format, see `kernels/k8v4.py`.
        arrangement: Name of the `Layout` of a page's planes.
        page_tokens: Tokens of a page.
        kv_heads: KV heads of the model. Each head has its own region of a page.
        head_size: Dims of a head.
        unquantised: Layers whose pages are not k8v4, as vLLM names them.
    """

    plugin: str
    page_format: int
    arrangement: str
    page_tokens: int
    kv_heads: int
    head_size: int
    unquantised: str

    def __str__(self) -> str:
        return (
            f"hybrid_kv {self.plugin}: k8v4 format {self.page_format}, {self.arrangement}, pages "
            f"of {self.page_tokens} tokens, {self.kv_heads} KV heads of {self.head_size}, "
            f"unquantised layers: {self.unquantised}"
        )


def fingerprint_of(vllm_config: VllmConfig) -> PageFingerprint | None:
    """Return the fingerprint of an engine's pages, or None without a k8v4 cache.

    vLLM must have chosen the block size already.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if cache.cache_dtype != CACHE_DTYPE or model is None:
        return None
    from vllm.platforms import current_platform

    head_size = model.get_head_size()
    # Choose like `attention.kernel_factory.kernels_for`, which would need a tensor's device.
    on_cpu = current_platform.is_cpu() and STATE.settings.cpu_isa != INTERPRETER
    layout = k8v4.Layout.CPU_TILED if on_cpu else k8v4.Layout.LINEAR
    return PageFingerprint(
        plugin=__version__,
        page_format=k8v4.FORMAT_VERSION,
        arrangement=layout.value,
        page_tokens=cache.block_size,
        kv_heads=model.get_total_num_kv_heads(),
        head_size=head_size,
        unquantised=" ".join(sorted(cache.kv_cache_dtype_skip_layers)) or "none",
    )


def marked(text: str) -> str:
    """If the last engine has a k8v4 cache, append its fingerprint to a key, seed or name.

    The result is never cached, because vLLM chooses the block size while an engine starts.
    """
    fingerprint = STATE.engine_config and fingerprint_of(STATE.engine_config)
    return f"{text} [{fingerprint}]" if fingerprint else text
