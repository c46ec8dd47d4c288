# SPDX-License-Identifier: Apache-2.0
"""What travels with k8v4 pages, so that only an engine that can read them does.

A page is bytes without a header. Two engines read the same numbers from it only where the page
format, its arrangement, its size and its heads are the same; nothing in the bytes would show that
they are not. The fingerprint says all of it in words that stand in vLLM's own handshakes, keys and
folders, so that whoever refuses names both sides.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.version import __version__

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class PageFingerprint:
    """What two engines must share to read each other's pages.

    The KV heads are those of the whole model: how many of them a tensor-parallel process holds
    is vLLM's to compare, for it cuts pages between heads, never inside one.

    Attributes:
        plugin: Version of this package, which wrote the numbers.
        page_format: Version of the format, see `kernels/k8v4.py`.
        arrangement: Name of the `Layout` in which a page's planes are.
        page_tokens: Tokens of a page.
        kv_heads: KV heads of the model, one region of the page after another.
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
        """Return it in words."""
        return (
            f"hybrid_kv {self.plugin}: k8v4 format {self.page_format}, {self.arrangement}, pages "
            f"of {self.page_tokens} tokens, {self.kv_heads} KV heads of {self.head_size}, "
            f"unquantised layers: {self.unquantised}"
        )

    @property
    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 of the words; names a folder."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def fields(self) -> dict[str, str | int]:
        """Return what a file beside stored pages holds."""
        return {**asdict(self), "words": str(self)}


def fingerprint_of(vllm_config: VllmConfig) -> PageFingerprint | None:
    """Return the fingerprint of an engine's pages; None where it has no k8v4 cache.

    Args:
        vllm_config: The engine's, with the block size that its model asks for.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if cache.cache_dtype != CACHE_DTYPE or model is None:
        return None
    from vllm.platforms import current_platform

    head_size = model.get_head_size()
    # The choice of `attention.device.kernels_for`, before there is a tensor.
    on_cpu = current_platform.is_cpu() and not STATE.settings.runs_triton_interpreter
    layout = k8v4.cpu_layout(head_size) if on_cpu else k8v4.Layout.LINEAR
    return PageFingerprint(
        plugin=__version__,
        page_format=k8v4.FORMAT_VERSION,
        arrangement=layout.value,
        page_tokens=cache.block_size,
        kv_heads=model.get_total_num_kv_heads(),
        head_size=head_size,
        unquantised=" ".join(sorted(cache.kv_cache_dtype_skip_layers)) or "none",
    )


def current_fingerprint() -> PageFingerprint | None:
    """Return that of the engine which this process set up last; None without a k8v4 cache.

    Computed when it is asked for: a model's block size is decided while its engine starts.
    """
    config = STATE.engine_config
    return None if config is None else fingerprint_of(config)


def marked(text: str) -> str:
    """Return a key, seed or name of vLLM's with the current fingerprint behind it, if there is one.

    Args:
        text: What vLLM compares between peers, or derives keys from.
    """
    fingerprint = current_fingerprint()
    return text if fingerprint is None else f"{text} [{fingerprint}]"
