# SPDX-License-Identifier: Apache-2.0
"""Import vLLM without torchvision, into a process that plans and never serves."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.tools.output import ToolError

IMAGES = "torchvision"

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Defaults for planning: no log lines, no download."""


def prepare() -> None:
    """Import vLLM with the plugin active and its log turned off.

    Raises:
        ToolError: vLLM cannot be imported, or the plugin does not support its version.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # vLLM prints messages until it has configured its logging.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    try:
        import_vllm()
    except ImportError as error:
        raise ToolError(str(error)) from error
    from vllm_hybrid_kv import plugin

    plugin.register()
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    if STATE.active_patches is None:
        raise ToolError("the plugin is inactive because it does not support this vLLM version")


def import_vllm() -> None:
    """Import vLLM, unless it is already imported, and hide torchvision from transformers.

    A vLLM for CPUs can come with a torchvision for GPUs, whose import fails. Planning needs no
    torchvision.

    Raises:
        ImportError: vLLM is not installed or is broken.
    """
    if "vllm" in sys.modules:
        return
    import vllm  # noqa: F401

    # transformers looks for torchvision when it is imported, and caches the answer.
    sys.modules[IMAGES] = None  # type: ignore[assignment]
    import transformers  # noqa: F401

    del sys.modules[IMAGES]


@contextmanager
def model_classes_in_this_process() -> Iterator[None]:
    """Make vLLM inspect model classes in this process, and make classes for images importable.

    vLLM inspects classes in a new process, because the process that forks its engine must not use
    CUDA. Planning forks no engine. vLLM's file of cached results is not used either.
    """
    from transformers.utils import is_torchvision_available
    from vllm.model_executor.models import registry

    # Modules of transformers and vLLM import names of torchvision, but planning uses none.
    if not is_torchvision_available() and PLACEHOLDERS not in sys.meta_path:
        sys.meta_path.insert(0, PLACEHOLDERS)

    def inspect(self: Any) -> Any:
        return registry._ModelInfo.from_model_cls(self.load_model_cls())

    with patch.object(registry._LazyRegisteredModel, "inspect_model_cls", inspect):
        yield


class FakeModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Replaces each module that `replaces` accepts by one in which every name is a class."""

    def __init__(self, replaces: Callable[[str], bool]) -> None:
        self.loaded: list[str] = []
        self._replaces = replaces

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if not self._replaces(fullname):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        pass

    def exec_module(self, module: ModuleType) -> None:
        self.loaded.append(module.__name__)
        module.__getattr__ = any_class  # type: ignore[method-assign]


PLACEHOLDERS = FakeModules(lambda name: name.partition(".")[0] == IMAGES)


class _AnyClass(type):
    """A metaclass. Its classes have any attribute, accept any index and decorate functions."""

    def __getattr__(cls, name: str) -> type:
        return any_class(name)

    def __getitem__(cls, _: Any) -> type:
        return cls

    def __call__(cls, *args: Any, **_: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else lambda function: function


def any_class(name: str) -> type:
    """Make a class of this name that has every attribute. Raise AttributeError for dunders."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyClass(name, (), {})
