# SPDX-License-Identifier: Apache-2.0
"""Compiled kernels on disk: they load in a fraction of the seconds that compiling takes.

Numba's own cache in numba's own place (`NUMBA_CACHE_DIR`, else next to the source, else the user's
cache directory), with two differences:

* An entry depends on the sources of all kernels, not only on the file of one function, so that no
  edit or upgrade runs old code.
* If nothing can be written or read, the kernels are compiled in memory, with one warning. A cache
  never stops a server.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile, NullCache
from numba.core.ccallback import CFunc

_logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def _digest_of_sources() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    folder = Path(__file__).parent
    for source in sorted([*folder.parent.glob("*.py"), *folder.glob("*.py")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()


_warnings: list[str] = []
_callbacks: list[Any] = []  # compiled code lives as long as numba's object of it


def _warn_once(reason: str) -> None:
    if not _warnings:
        _warnings.append(reason)
        _logger.warning(
            "k8v4 CPU kernels are compiled in memory at each start, because their cache cannot be "
            "used (%s); set NUMBA_CACHE_DIR to a writable directory to keep them",
            reason,
        )


class _Cache(FunctionCache):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        digest = _digest_of_sources()
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=f"{self._impl.filename_base}-{digest[:16]}",
            source_stamp=digest,
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling a damaged file raises anything
            _warn_once(f"reading {self._cache_path}: {error!r}")
            self._enabled = False
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_once(f"writing {self._cache_path}: {error!r}")


def _cache_of(function: Callable[..., Any]) -> Any:
    try:
        return _Cache(function)
    except (RuntimeError, OSError) as error:  # numba found no place to write to
        _warn_once(str(error))
        return NullCache()


def cached(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator: `numba.njit(**options)` with the compiled code kept on disk.

    For module-level functions; an entry includes the functions that they call.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        dispatcher._cache = _cache_of(function)
        return dispatcher

    return decorate


def compile_callback(function: Callable[..., Any]) -> int:
    """Compile a function of two addresses, or load it from disk, and return the code's address.

    Code that is called by address is compiled once. Called by name it would be optimised again in
    each of the functions that numba makes of a parallel loop.
    """
    callback = CFunc(function, ((types.int64, types.int64), types.void), {}, {})
    callback._cache = _cache_of(function)
    callback.compile()
    _callbacks.append(callback)
    return int(callback.address)
