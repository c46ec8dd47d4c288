# SPDX-License-Identifier: Apache-2.0
"""A very small vLLM of two releases, and a plugin of it, made of files."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from tests.drift.adapters import Adapter
from tests.drift.release import Release
from tests.drift.targets import fingerprints
from vllm_hybrid_kv.patches.base import Fingerprint, Target

FILES = {
    "__init__.py": "from .version import __version__\n",
    "version.py": '__version__ = "0.90.0"\n',
    "planning.py": """
        def plan(config, sizes=(1, 2)):
            # The order of sizes is kept.
            total = 0
            for size in sizes:
                total += size
            return config, total


        def capacity(config):
            return len(config)
        """,
    "managing.py": """
        from abc import ABC, abstractmethod

        from vllm.planning import capacity


        class Base(ABC):
            unit: int = 16

            def free(self, block):
                self.pool = [block]
                return self.pool

            @abstractmethod
            def find(self, hashes): ...


        class Manager(Base):
            def __init__(self, config, blocks):
                self.config = config
                self.blocks = blocks

            def find(self, hashes):
                return hashes

            @classmethod
            def make(cls, config):
                return cls(config, capacity(config))
        """,
    "checking.py": """
        from vllm.managing import Manager


        def check(manager):
            return isinstance(manager, Manager)
        """,
}


def write(folder: Path, version: str = "0.90.0", **changed: str | None) -> Release:
    """Write a release.

    Args:
        folder: Where to.
        version: Its version.
        **changed: Files that differ, by name without ending; None for one that is not there.
    """
    files: dict[str, str | None] = {**FILES, "version.py": f'__version__ = "{version}"\n'}
    files |= {f"{name}.py": text for name, text in changed.items()}
    for name, text in files.items():
        if text is not None:
            file = folder / "vllm" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
    metadata = folder / f"vllm-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nRequires-Python: >=3.11\n"
        "Requires-Dist: torch==2.14.0\nRequires-Dist: numba==0.65.0; extra == 'audio'\n"
    )
    return Release(folder)


def edited(name: str, *replacements: tuple[str, str]) -> dict[str, Any]:
    """Return a file of the release with text replaced, for `write`.

    Args:
        name: Without ending.
        *replacements: What is there, and what takes its place.
    """
    text = FILES[f"{name}.py"]
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return {name: text}


PLACES = {
    "plan": ("vllm.planning", "plan"),
    "capacity": ("vllm.planning", "capacity"),
    "init": ("vllm.managing", "Manager.__init__"),
    "make": ("vllm.managing", "Manager.make"),
}


def adapter(known: Release) -> Adapter:
    """Return an adapter that knows a release, with that at hand."""
    read = fingerprints(known, PLACES.values())
    targets = {}
    for field, place in PLACES.items():
        fingerprint = read[place]
        assert isinstance(fingerprint, Fingerprint), fingerprint
        targets[field] = Target(*place, fingerprint)
    return Adapter(known.minor, "plugin.patches.v0_90", targets, {}, known)


PLUGIN = {
    "__init__.py": "",
    "ours.py": """
        from vllm import managing
        from vllm.managing import Manager
        from vllm.planning import plan


        class Ours(Manager):
            def find(self, hashes):
                return super().free(self.blocks)


        class Pool:
            def empty(self, manager):
                return managing.capacity(manager.pool)
        """,
}


def write_plugin(root: Path) -> Path:
    """Write a package that uses vLLM; return the folder that has it."""
    (root / "plugin").mkdir(parents=True)
    for name, text in PLUGIN.items():
        (root / "plugin" / name).write_text(textwrap.dedent(text))
    return root
