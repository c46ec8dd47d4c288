# SPDX-License-Identifier: Apache-2.0
"""Hybrid and quantised KV caches for vLLM.

Public names are imported on first use, because vLLM imports this package in every process.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from vllm_hybrid_kv.version import __version__

if TYPE_CHECKING:
    from vllm_hybrid_kv.errors import (
        HybridKVAgreementError,
        HybridKVError,
        HybridKVFingerprintError,
        HybridKVPatchError,
        HybridKVSettingsError,
        HybridKVStrategyError,
        HybridKVVersionError,
    )
    from vllm_hybrid_kv.hooks import hookimpl
    from vllm_hybrid_kv.plugin import register
    from vllm_hybrid_kv.settings import Settings
    from vllm_hybrid_kv.state import current_settings

__all__ = [
    "HybridKVAgreementError",
    "HybridKVError",
    "HybridKVFingerprintError",
    "HybridKVPatchError",
    "HybridKVSettingsError",
    "HybridKVStrategyError",
    "HybridKVVersionError",
    "Settings",
    "__version__",
    "current_settings",
    "hookimpl",
    "register",
]

_MODULE_OF_NAME = {
    "Settings": "settings",
    "current_settings": "state",
    "hookimpl": "hooks",
    "register": "plugin",
}
"""The module of each public name that `errors` does not define."""

_RENAMED = {"HybridKVSeamError": "HybridKVPatchError"}
"""The new name for each deprecated name. 0.3 removes the deprecated names."""

_COME_WITH_VLLM = ("numba", "pydantic", "torch", "vllm")

INSTALL_VLLM = (
    "vLLM is not installed. Install it with this package: "
    "`pip install 'vllm-hybrid-kv[cpu]'` on a CPU, `pip install 'vllm-hybrid-kv[cuda]'` on a GPU"
)


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        new = _RENAMED[name]
        warnings.warn(
            f"vllm_hybrid_kv.{name} is deprecated; use {new}", DeprecationWarning, stacklevel=2
        )
        name = new
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULE_OF_NAME.get(name, 'errors')}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _COME_WITH_VLLM:
            raise
        raise ImportError(f"vllm_hybrid_kv.{name} needs {error.name}. {INSTALL_VLLM}") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
