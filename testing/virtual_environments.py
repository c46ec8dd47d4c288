# SPDX-License-Identifier: Apache-2.0
"""Make virtual environments that link to the installed packages and add a test's own packages."""

import sys
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testing import processes

OURS = ("vllm_hybrid_kv", "__editable__")
COMMAND = "from vllm_hybrid_kv.tools.main import app; app(prog_name='vllm-hybrid-kv')"


def distribution(
    site: Path, name: str, version: str, entry_points: str = "", **modules: str
) -> None:
    """Write a package with metadata; `modules` has the source of each module by name."""
    information = site / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (information / "METADATA").write_text(metadata)
    (information / "entry_points.txt").write_text(entry_points)
    for module, code in modules.items():
        (site / f"{module}.py").write_text(code)


@dataclass(frozen=True)
class Environment:
    """A virtual environment: its interpreter, and its `site-packages`."""

    python: Path
    site: Path

    def package(self, name: str, **files: str) -> Path:
        """Replace a linked package by a package that consists of `files` and has no metadata."""
        folder = self.site / name
        folder.unlink(missing_ok=True)
        folder.mkdir()
        for file, code in files.items():
            (folder / f"{file}.py").write_text(code)
        return folder

    def later(self, name: str) -> Path:
        """Make a folder that comes after `site-packages` on the path."""
        folder = self.site.parent / name
        folder.mkdir()
        (self.site / f"{name}.pth").write_text(f"{folder}\n")
        return folder

    def run(self, code: str, *arguments: str, **environment: str) -> Any:
        """Run Python without this plugin's and vLLM's variables in the environment."""
        environment = {"HF_HUB_OFFLINE": "1", "COLUMNS": "100", **environment}
        return processes.run(
            [self.python, "-c", code, *arguments],
            timeout_s=300.0,
            cwd=self.site.parent,
            without=("VLLM_HYBRID_KV_", "PYTHON", "VLLM_PLUGINS"),
            **environment,
        )

    def doctor(self, *arguments: str, **environment: str) -> Any:
        return self.run(COMMAND, "doctor", *arguments, **environment)


def make(folder: Path, wheel: Path, *, without: Iterable[str] = ()) -> Environment:
    """Make an environment with all packages of this environment, and with our wheel.

    Args:
        folder: The folder to make it in.
        wheel: The unpacked wheel.
        without: Prefixes of names in `site-packages` to omit.
    """
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    omitted = (*OURS, "__pycache__", *without)
    for installed in map(Path, sys.path):
        if installed.name == "site-packages":
            for entry in installed.iterdir():
                link = site / entry.name
                if (
                    not entry.name.startswith(omitted)
                    and entry.suffix != ".pth"
                    and not link.is_symlink()
                ):
                    link.symlink_to(entry)
    for entry in wheel.iterdir():
        (site / entry.name).symlink_to(entry)
    return Environment(python, site)
