# SPDX-License-Identifier: Apache-2.0
"""Placeholders for torchvision, and the import of vLLM next to a broken one."""

import importlib
import importlib.util
import sys

import pytest

from vllm_hybrid_kv.tools.plan import vllm_import
from vllm_hybrid_kv.tools.plan.vllm_import import IMAGES, Placeholders, _images_work


@pytest.fixture
def modules(monkeypatch):
    """The process's modules without torchvision; later imports are undone."""
    kept = {name: module for name, module in sys.modules.items() if not _of_images(name)}
    monkeypatch.setattr(sys, "modules", kept)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for finder in list(sys.meta_path):
        if isinstance(finder, Placeholders):
            sys.meta_path.remove(finder)
    return kept


def _of_images(name):
    return name.partition(".")[0] == IMAGES


def test_placeholders_have_any_name_and_any_attribute(modules):
    Placeholders.install()
    functional = importlib.import_module("torchvision.transforms.v2.functional")
    from torchvision.io import ImageReadMode

    assert isinstance(ImageReadMode.RGB, type)
    assert isinstance(functional.InterpolationMode.BICUBIC, type)
    # Python itself looks for such names.
    assert not hasattr(functional, "__wrapped__")
    assert not hasattr(ImageReadMode, "__wrapped__")


def test_placeholders_replace_only_torchvision(modules):
    Placeholders.install()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("torchvision_extras")


def test_a_broken_torchvision_is_detected_and_removed(modules, tmp_path):
    package = tmp_path / IMAGES
    package.mkdir()
    (package / "__init__.py").write_text("from . import io\nraise RuntimeError('no operator')\n")
    (package / "io.py").write_text("")
    sys.path.insert(0, str(tmp_path))
    importlib.invalidate_caches()
    assert not _images_work()
    assert not any(map(_of_images, sys.modules))
    (package / "__init__.py").write_text("")
    importlib.invalidate_caches()
    assert _images_work()


def test_a_process_that_has_imported_vllm_is_unchanged(monkeypatch):
    import vllm

    monkeypatch.setattr(vllm_import, "_images_work", lambda: pytest.fail("looked for torchvision"))
    vllm_import.import_vllm()
    assert sys.modules["vllm"] is vllm
