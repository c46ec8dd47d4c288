# SPDX-License-Identifier: Apache-2.0
"""The devices of a machine, which kernels each would use, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_hybrid_kv.tools.doctor.child import Answer
from vllm_hybrid_kv.tools.doctor.installation import Installation

_PORTABLE = "portable"
_FAST = "for bfloat16 and heads of a multiple of 32, portable for others"


@dataclass(frozen=True)
class Device:
    """A device.

    Attributes:
        kind: `cpu` or `gpu`.
        name: What its maker calls it, with its size.
        kernels: The kernels for a k8v4 cache on it; None where there are none or nobody knows.
        why: Why these, or why none.
    """

    kind: str
    name: str
    kernels: str | None
    why: str


def devices(installation: Installation, answer: Answer) -> list[Device]:
    """Return the CPU and the GPUs that torch sees."""
    cores = f"{installation.cpu_count} core{'' if installation.cpu_count == 1 else 's'}"
    kernels, why = _cpu(answer)
    found = [Device("cpu", f"{installation.cpu_model}, {cores}", kernels, why)]
    for gpu in answer.found.get("gpus", ()):
        name = f"{gpu['name']}, {gpu['memory'] / (1 << 30):.0f} GiB"
        found.append(Device("gpu", name, *_gpu(gpu, answer)))
    return found


def _cpu(answer: Answer) -> tuple[str | None, str]:
    cpu, platform = answer.found.get("cpu"), answer.found.get("platform")
    if cpu is None:
        return None, "torch cannot be imported, which knows the CPU's instructions"
    if platform is not None and not platform["cpu"]:
        return None, f"vLLM runs on {platform['device'] or 'no device that it found'}"
    paths = cpu["paths"]
    chosen = (answer.found.get("chosen") or {}).get("isa") or paths[-1]
    source = {row["name"]: row["source"] for row in answer.found.get("settings", ())}
    asked = source.get("cpu_isa", "default")
    if chosen == "interpreter":
        return "triton, interpreted", f"asked for by {asked}"
    if chosen != paths[-1]:
        why = f"asked for by {asked}; {paths[-1]} would be faster"
    else:
        slower = [path for path in cpu["lacking"] if path not in paths]
        why = "the fastest that this CPU runs"
        if slower:
            lacking = cpu["lacking"][slower[0]]
            missing = f"lacks {', '.join(lacking)}" if lacking else "is refused by this system"
            why += f"; {slower[0]} {missing}"
    return f"cpu:{chosen}", why if chosen == _PORTABLE else f"{why}; {_FAST}"


def _gpu(gpu: dict[str, Any], answer: Answer) -> tuple[str | None, str]:
    platform = answer.found.get("platform")
    if platform is None:
        return None, "vLLM has not said what it runs on"
    if not platform["gpu"]:
        return None, f"vLLM runs on {platform['device'] or 'no device that it found'}"
    if gpu["capability"] is None:
        return "triton", f"tile sizes derived, none were measured on {gpu['architecture']}"
    capability = ".".join(map(str, gpu["capability"]))
    row = answer.found.get("tile_sizes", {}).get(capability)
    if row is None:
        return None, f"Triton cannot be asked about compute capability {capability}"
    if not row["served"]:
        return None, f"compute capability {capability}; the kernels need 7.5"
    if row["origin"] == "measured":
        return "triton", f"tile sizes measured on compute capability {capability}"
    return "triton", f"tile sizes derived, none were measured on compute capability {capability}"
