# SPDX-License-Identifier: Apache-2.0
"""Prints what the plugin needs of the vLLM that this process imports, as one JSON line.

Reads `{"places": [...], "imports": [[module, name], ...]}`. Sources are read as the plugin reads
them; an import is `null` if it works, or the error.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from typing import Any

from vllm_hybrid_kv.patches.mechanism import Target, source_hash, source_of, underlying


def read(place: str) -> dict[str, Any]:
    try:
        function = underlying(Target(place, "").binding())
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
        return {
            "hash": source_hash(function),
            "parameters": [str(one.replace(annotation=one.empty)) for one in parameters],
            "source": source_of(function).splitlines(),
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def import_error(module: str, name: str) -> str | None:
    try:
        if not hasattr(importlib.import_module(module), name):
            importlib.import_module(f"{module}.{name}")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    import vllm
    from vllm.version import __version__

    wanted = json.load(sys.stdin)
    answer = {
        "version": __version__,
        "file": vllm.__file__,
        "functions": {place: read(place) for place in wanted["places"]},
        "imports": [import_error(*pair) for pair in wanted["imports"]],
    }
    print(json.dumps(answer))


main()
