# SPDX-License-Identifier: Apache-2.0
"""Check the CPU and the GPUs, and say which kernels run on them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from vllm_hybrid_kv.tools.doctor.runner import Facts, Finding, check, finding, setting
from vllm_hybrid_kv.tools.machine import cpu_model


def cpu_device() -> dict[str, str | None]:
    """Describe this CPU as a device of the report. `kernels` is filled in later."""
    # macOS has no affinity.
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = f"{cpu_model()}, {count} core{'' if count == 1 else 's'}"
    return {"kind": "cpu", "name": name, "kernels": None}


@check("Reading the devices and their kernels", "platform", error=("warning", "device"))
def devices(facts: Facts) -> Iterator[Finding]:
    """The CPU kernels need numba; the GPU kernels need a compute capability of 8.0."""
    import torch

    facts["torch"] = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    platform = facts["platform"]
    other = f"vLLM runs on {platform['device'] or 'no known device'}"
    row = {**cpu_device(), "why": other}
    facts["devices"] = [row]
    if platform["cpu"]:
        row["kernels"], row["why"] = _cpu_kernels(facts)
        if importlib.util.find_spec("numba") is None:
            message = "numba is not installed; the CPU kernels cannot be compiled without it"
            yield finding("warning", "device", message, "Install numba")
        if facts.get("isa") == "interpreter":
            message = "Triton's interpreter runs the GPU kernels; a token takes seconds"
            remedy = "Set cpu_isa to auto, unless you test those kernels"
            yield finding("warning", "device", message, remedy)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        kernels, why = _gpu_kernels(gpu) if platform["gpu"] else (None, other)
        name = f"{gpu.name}, {gpu.total_memory / (1 << 30):.0f} GiB"
        facts["devices"].append({"kind": "gpu", "name": name, "kernels": kernels, "why": why})
        if platform["gpu"] and kernels is None:
            remedy = "Serve with --kv-cache-dtype auto on that GPU"
            yield finding("warning", "device", f"{gpu.name} has {why}", remedy)


def _cpu_kernels(facts: Facts) -> tuple[str, str]:
    from vllm_hybrid_kv.kernels.cpu import isa

    available = isa.available()
    chosen = facts.get("isa") or available[-1]
    why = "the fastest on this CPU"
    if chosen != available[-1]:
        why = f"chosen by {setting(facts, 'cpu_isa')['source']}; {available[-1]} would be faster"
    elif faster := isa.ALL[len(available) :]:
        needs = ", ".join(isa.lacking(faster[0])) or "the permission of the operating system"
        why += f"; {faster[0]} needs {needs}"
    if chosen == "interpreter":
        return "triton, interpreted", why
    if chosen == isa.AMX:
        why += f"; for head sizes that are multiples of 32, {isa.AVX512_VNNI} otherwise"
    return f"cpu:{chosen}", why


def _gpu_kernels(gpu: Any) -> tuple[str | None, str]:
    import torch

    from vllm_hybrid_kv.attention.backend import COMPUTE_CAPABILITY, refuse_compute_capability
    from vllm_hybrid_kv.kernels.triton import tuning

    if torch.version.hip:
        return "triton", f"tile sizes derived, not measured on {gpu.gcnArchName}"
    capability = f"compute capability {gpu.major}.{gpu.minor}"
    if (gpu.major, gpu.minor) < COMPUTE_CAPABILITY:
        return None, f"{capability}; {refuse_compute_capability()}"
    measured = tuning.origin((gpu.major, gpu.minor)) == "measured"
    sizes = "measured" if measured else "derived, not measured"
    return "triton", f"tile sizes {sizes} on {capability}"
