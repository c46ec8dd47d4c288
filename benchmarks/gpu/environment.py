# SPDX-License-Identifier: Apache-2.0
"""Describe the machine, keep the time budget, and import modules of the installed vLLM."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import time
from types import ModuleType
from typing import Any

import torch
import triton

from vllm_hybrid_kv.kernels.triton import tuning


class Unavailable(Exception):
    """A contender or a check cannot run here; the message says why."""


def interpreted() -> bool:
    """Return whether Triton interprets kernels on CPU tensors in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_for_kernels() -> torch.device:
    """Return the GPU, or the CPU if Triton interprets.

    Raises:
        Unavailable: There is no GPU and Triton does not interpret.
    """
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Unavailable("torch finds no GPU; to try the command without one, pass --rehearse")
    return torch.device("cuda", torch.cuda.current_device())


class Budget:
    """A time limit in seconds. The time starts when the object is made."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self._start


@functools.cache
def _prepare_vllm() -> None:
    """Make vLLM's kernels importable without an engine, its compiled code or a GPU."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    utilities: Any = importlib.import_module("vllm.triton_utils")
    if interpreted():
        # Without a GPU, vLLM would define its kernels with a stub instead of Triton.
        utilities.triton = triton
        utilities.tl = triton.language
        # vLLM's workspace calls this to free GPU memory, which fails without a GPU.
        torch.accelerator.empty_cache = lambda: None
        if not torch.cpu._is_avx512_bf16_supported():
            # vLLM's backend loads `vllm._C` to detect AMD GPUs. In vLLM for CPUs, this module
            # ends the process on a CPU without AVX-512 BF16.
            sys.modules.setdefault("vllm._C", ModuleType("vllm._C"))


def vllm_module(name: str) -> ModuleType:
    """Import one of vLLM's modules.

    Raises:
        Unavailable: The module cannot be imported.
    """
    try:
        _prepare_vllm()
        return importlib.import_module(name)
    # Whatever vLLM's import raises, exclude the contender and report why.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise Unavailable(f"{name}: {type(error).__name__}: {reason}") from error


def has_flash_attention() -> bool:
    """Return whether vLLM's compiled FlashAttention is installed, not a Python stand-in."""
    for name in ("_vllm_fa3_C", "_vllm_fa2_C"):
        try:
            module = vllm_module(f"vllm.vllm_flash_attn.{name}")
        except Unavailable:
            continue
        return not str(getattr(module, "__file__", "")).endswith(".py")
    return False


def machine() -> dict[str, Any]:
    """Describe the machine and the versions that a result depends on, for JSON."""
    device = device_for_kernels()
    try:
        vllm = str(vllm_module("vllm").__version__)
    except Unavailable:
        vllm = "absent"
    versions = {
        "interpreted": interpreted(), "torch": torch.__version__, "triton": triton.__version__,
        "vllm": vllm,
    }  # fmt: skip
    if device.type != "cuda":
        return versions
    properties = torch.cuda.get_device_properties(device)
    return versions | {
        "gpu": properties.name,
        "compute_capability": torch.cuda.get_device_capability(device),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "flash_attention": has_flash_attention(),
        "tiling": tuning.origin(tuning.capability_of(device)),
    }


def l2_bytes(device: torch.device) -> int:
    """Return the size of the L2 cache in bytes; 0 without a GPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)
