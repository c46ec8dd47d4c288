# SPDX-License-Identifier: Apache-2.0
"""Imports of a process that plans and never runs a model: what it can do without.

Nothing of this belongs into a process that serves.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

IMAGES = "torchvision"


def import_vllm() -> None:
    """Import vLLM in a process that has not imported it yet, whatever state torchvision is in.

    One that is installed and broken, as vLLM for CPUs can bring it along, keeps transformers from
    being imported, and so vLLM. It is put aside.

    Raises:
        ImportError: vLLM is not installed, or broken.
    """
    if "vllm" in sys.modules:
        return
    import vllm  # noqa: F401

    if importlib.util.find_spec(IMAGES) is not None and not _images_work():
        _have_images_missing()


def _have_images_missing() -> None:
    """Have transformers, which asks once, find that there is no torchvision."""
    sys.modules[IMAGES] = None  # type: ignore[assignment]
    try:
        from transformers.utils import is_torchvision_available

        is_torchvision_available()
    finally:
        del sys.modules[IMAGES]


def _images_work() -> bool:
    """Return whether torchvision can be imported, which transformers would do next."""
    try:
        importlib.import_module(IMAGES)
    except Exception:
        for name in [name for name in sys.modules if name.partition(".")[0] == IMAGES]:
            del sys.modules[name]
        return False
    return True


@contextmanager
def model_classes_in_this_process() -> Iterator[None]:
    """Have vLLM look at model classes here, and have those for images work without torchvision.

    vLLM looks at a class in a process of its own, to keep CUDA out of the one that forks its
    engine, and imports itself there once more. No engine is forked here. What it finds it keeps
    in a file, which is neither read nor written.
    """
    from transformers.utils import is_torchvision_available
    from vllm.model_executor.models import registry

    if not is_torchvision_available():
        _Placeholders.install()

    def inspect(self: Any) -> Any:
        return registry._ModelInfo.from_model_cls(self.load_model_cls())

    with patch.object(registry._LazyRegisteredModel, "inspect_model_cls", inspect):
        yield


class _Placeholders(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules in torchvision's place that have any name.

    transformers' and vLLM's modules for images import names of it as they are imported. Nothing
    calls them, for no image is ever processed.
    """

    @classmethod
    def install(cls) -> None:
        """Find these from now on, before whatever else has their names."""
        if not any(isinstance(finder, cls) for finder in sys.meta_path):
            sys.meta_path.insert(0, cls())

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for torchvision and all that may be in it, None for anything else."""
        if fullname.partition(".")[0] != IMAGES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leave making the module to Python."""

    def exec_module(self, module: ModuleType) -> None:
        """Give the module a class for every name that it is asked for."""
        module.__getattr__ = _placeholder  # type: ignore[method-assign]


class _AnyName(type):
    """The class of classes that have any attribute."""

    def __getattr__(cls, name: str) -> type:
        return _placeholder(name)


def _placeholder(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyName(name, (), {})
