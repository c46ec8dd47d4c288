# SPDX-License-Identifier: Apache-2.0
"""Choose the FlashAttention of vLLM that serves long prefills, once for each layer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm_hybrid_kv.kernels.triton import Flash

logger = init_logger("vllm.hybrid_kv.attention")

LONG_PREFILL = 128
"""FlashAttention serves requests with at least so many new tokens."""


@dataclass(frozen=True)
class FlashAttention:
    """A version of FlashAttention.

    Attributes:
        version: Its major version.
        function: `flash_attn_varlen_func`.
    """

    version: int
    function: Flash


def choose(head_size: int, *, soft_cap: bool) -> FlashAttention | None:
    """Return the FlashAttention for long prefills, or None if our own kernel serves them.

    Sinks do not matter, because our own kernel adds them to the merged results.
    """
    if not current_platform.is_cuda_alike():
        return None
    selected = _select(head_size, soft_cap)
    flash = selected if isinstance(selected, FlashAttention) else None
    chosen = f"FlashAttention {flash.version}" if flash else f"the k8v4 kernel, because {selected}"
    message = "Prefills of %d or more tokens, head size %d: %s"
    logger.info_once(message, LONG_PREFILL, head_size, chosen)
    return flash


def _select(head_size: int, soft_cap: bool) -> FlashAttention | str:
    """Return a FlashAttention, or say why none can serve."""
    if not current_platform.is_cuda():
        return "FlashAttention on AMD GPUs has other arguments"
    config = get_current_vllm_config_or_none()
    if config is not None and config.parallel_config.decode_context_parallel_size > 1:
        return "with decode context parallelism a rank has only some of the keys"
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(head_size=head_size, requires_softcap=soft_cap)
    if version is None:
        return "this vLLM has no FlashAttention for this GPU"
    if head_size > 256 and version < 4:
        return f"FlashAttention {version} serves head sizes up to 256"
    function = functools.partial(fa_utils.flash_attn_varlen_func, fa_version=version)
    return FlashAttention(version, function)
