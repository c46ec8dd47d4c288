# SPDX-License-Identifier: Apache-2.0
"""The only place that rebinds vLLM's names, with one adapter for each vLLM minor."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_hybrid_kv.patches.base import Patch
    from vllm_hybrid_kv.patches.context import Context

ADAPTERS = {
    (0, 32): "vllm_hybrid_kv.patches.v0_32",
    (0, 33): "vllm_hybrid_kv.patches.v0_33",
}
"""The module that knows each supported minor."""

SUPPORTED = " and ".join(".".join(map(str, minor)) for minor in ADAPTERS)
"""The supported minors in words."""


def patches_for(minor: tuple[int, int], context: Context) -> list[Patch]:
    """Return the patches of a supported minor, not applied."""
    patches: list[Patch] = importlib.import_module(ADAPTERS[minor]).patches(context)
    return patches
