# SPDX-License-Identifier: Apache-2.0
"""Keep compiled kernels on disk: compiling takes seconds, loading a fraction of that.

This is numba's cache in its usual directory (`NUMBA_CACHE_DIR`, otherwise next to the source,
otherwise the user's cache directory), with two differences:

* An entry depends on the sources of all kernels, so an edit or upgrade never runs old code.
* If the directory cannot be read or written, kernels are compiled in memory, with one warning.
"""

from __future__ import annotations

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


_FOLDER = Path(__file__).parent
_SOURCES = sorted([*_FOLDER.parent.glob("*.py"), *_FOLDER.glob("*.py")])
_CONTENTS = [numba.__version__.encode(), *(source.read_bytes() for source in _SOURCES)]
_DIGEST = hashlib.sha256(b"".join(_CONTENTS)).hexdigest()


def _warn(reason: str) -> None:
    """Warn, once per process."""
    _logger.warning(
        "k8v4 CPU kernels are compiled in memory at each start, because their cache cannot be "
        "used (%s); set NUMBA_CACHE_DIR to a writable directory to keep them",
        reason,
    )
    _logger.disabled = True


class _Cache(FunctionCache):
    def __init__(self, function: Callable[..., Any], suffix: str) -> None:
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=f"{self._impl.filename_base}-{_DIGEST[:16]}{suffix}",
            source_stamp=_DIGEST,
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:  # unpickling a damaged file raises anything
            _warn(f"reading {self._cache_path}: {error!r}")
            self._enabled = False
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(f"writing {self._cache_path}: {error!r}")


def _cache_of(function: Callable[..., Any], suffix: str = "") -> Any:
    try:
        return _Cache(function, suffix)
    except (RuntimeError, OSError) as error:  # numba found no place to write to
        _warn(str(error))
        return NullCache()


def cached(function: Callable[..., Any], **options: bool) -> Any:
    """Compile a module-level function with `numba.njit`, and keep its code on disk.

    An entry of the cache includes the functions that the function calls.
    """
    dispatcher = numba.njit(function, **options)
    dispatcher._cache = _cache_of(function, "".join(f"-{option}" for option in options))
    return dispatcher


def compile_callback(function: Callable[..., Any]) -> CFunc:
    """Compile a function of two addresses, or load it from disk.

    Other kernels should call it by its `address`, so that it is compiled once. If they called it by
    name, LLVM would optimise it again in each function that numba makes from a parallel loop.
    """
    callback = CFunc(function, ((types.int64, types.int64), types.void), {}, {})
    callback._cache = _cache_of(function)
    callback.compile()
    return callback
