# SPDX-License-Identifier: Apache-2.0
"""Make vLLM plan for an NVIDIA GPU on any machine, with a CUDA platform that needs no driver.

`described_gpu` replaces the class of vLLM's only platform object, so every module that imported
`current_platform` sees this GPU. In its `with` block, no code can reach the real platform.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import vllm.platforms
from vllm.platforms.interface import DeviceCapability, Platform

from vllm_hybrid_kv.tools.plan.vllm_import import FakeModules, any_class

CAPABILITY = (9, 0)
NAME = "NVIDIA H100 80GB HBM3"
MEMORY = 80 << 30
PROCESSORS = 132
_EXTENSIONS = ("_C", "_C_stable_libtorch")
_PACKAGES = (
    *("cuda", "cutlass", "flashinfer", "quack", "tilelang", "torchaudio"),
    *("vllm.third_party.deep_gemm", "vllm.third_party.flashmla", "vllm.vllm_flash_attn.cute"),
)
"""Packages of vLLM for CUDA that may be missing or broken on this machine."""

_ANSWERS = {
    "import_kernels": None,
    "log_warnings": None,
    "get_device_capability": DeviceCapability(*CAPABILITY),
    "get_device_name": NAME,
    "get_device_uuid": "GPU-0",
    "get_device_total_memory": MEMORY,
    "get_cuda_runtime_major": 13,
    # Larger than any parallel size, so that vLLM never finds too few GPUs.
    "device_count": 1 << 20,
    "num_compute_units": PROCESSORS,
    "is_fully_connected": True,
    "is_integrated_gpu": False,
    "is_arch_support_pdl": True,
    "is_pin_memory_available": False,
    "get_device_numa_node": None,
    "get_all_device_numa_nodes": None,
}
"""What each method of the platform returns."""


@contextmanager
def described_gpu() -> Iterator[None]:
    """Make vLLM configure and build models for the described GPU on any machine.

    If vLLM runs on an NVIDIA GPU here, it plans for that GPU instead.
    """
    platform = vllm.platforms.current_platform
    if platform.is_cuda():
        yield
        return
    # Compiler passes look up CUDA's operators when they are imported for CUDA. Nothing is compiled.
    importlib.import_module("vllm.compilation.backends")

    real_class = type(platform)
    with ExitStack() as stack:
        stack.enter_context(_cuda_modules())
        described = _described_class()
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(_clear_caches)
        stack.callback(setattr, platform, "__class__", real_class)
        platform.__class__ = described
        _clear_caches()
        for target, name, value in _cuda_names():
            stack.enter_context(patch.object(target, name, value, create=True))
        yield


@functools.cache
def _described_class() -> type[Platform]:
    from vllm.platforms.cuda import CudaPlatformBase

    class DescribedGpu(CudaPlatformBase):
        """One Hopper GPU of 80 GiB. vLLM's defaults for servers were chosen for such GPUs."""

        device_name = NAME

        @classmethod
        def get_valid_backends(cls, *args: Any, **kwargs: Any) -> Any:
            valid, invalid = super().get_valid_backends(*args, **kwargs)
            # Drop backends that failed to import because this machine lacks a package.
            about_gpu = {
                backend: (priority, reasons)
                for backend, (priority, reasons) in invalid.items()
                if not any("Error: " in reason for reason in reasons)
            }
            return valid, about_gpu

    for name, answer in _ANSWERS.items():
        method = classmethod(lambda cls, *_, _answer=answer, **__: _answer)
        setattr(DescribedGpu, name, method)
    return DescribedGpu


def _restore_environment(before: dict[str, str]) -> None:
    """Undo the variables that vLLM set for one model, but keep the plugin's variables."""
    for name in os.environ.keys() | before.keys():
        if "HYBRID_KV" in name:
            continue
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


def _clear_caches() -> None:
    """Clear vLLM's cached answers about the platform and about installed packages."""
    from vllm.utils import deep_gemm, flashinfer, import_utils
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()
    for module in (deep_gemm, flashinfer, import_utils):
        for value in vars(module).values():
            if callable(value) and hasattr(value, "cache_clear"):
                value.cache_clear()


def _cuda_names() -> Iterator[tuple[Any, str, Any]]:
    """Yield (owner, name, placeholder) for objects that exist only in vLLM's CUDA build."""
    import vllm.config.vllm
    from vllm import _custom_ops, triton_utils
    from vllm.utils import flashinfer
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.mla import flashinfer_mla_sparse_sm90
    from vllm.v1.attention.ops import flashmla
    from vllm.vllm_flash_attn import flash_attn_interface

    for name in (
        "flash_attn_varlen_func",
        "get_scheduler_metadata",
        "reshape_and_cache_flash",
        "compile_flash_attn_varlen_func_from_specs",
    ):
        if not hasattr(fa_utils, name):
            yield fa_utils, name, _never_called
    for name in dir(_custom_ops):
        if "_supports_" in name or name.endswith("_supported"):
            # Hopper's tensor cores multiply FP8 but not FP4.
            yield _custom_ops, name, lambda *_, answer="fp4" not in name: answer
    if not triton_utils.HAS_TRITON:
        # vLLM's placeholders for Triton lack the names that modules use only on GPUs.
        for kind in (type(triton_utils.triton), type(triton_utils.tl)):
            yield kind, "__getattr__", lambda _, name: any_class(name)
        yield triton_utils.triton, "Config", _autotuner_config
    yield from (
        (flash_attn_interface, "FA2_AVAILABLE", True),
        (flash_attn_interface, "FA3_AVAILABLE", True),
        (flash_attn_interface, "FA4_AVAILABLE", True),
        (flashmla, "_flashmla_C_AVAILABLE", True),
        (flashmla, "_flashmla_extension_C_AVAILABLE", True),
        (torch._ops._OpNamespace, "__getattr__", _operator),
        # Say that compiled kernels exist, because FlashInfer otherwise needs CUDA's compiler.
        (flashinfer, "has_flashinfer_cubin", lambda: True),
        (flashinfer_mla_sparse_sm90, "has_flashinfer_sm90_nope_mla", lambda: True),
        # A server has Triton, and vLLM selects model runner V2 only with Triton.
        (vllm.config.vllm, "HAS_TRITON", True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "get_device_capability", lambda *_: CAPABILITY),
        (torch.cuda, "get_device_name", lambda *_: NAME),
        (torch.cuda, "get_device_properties", lambda *_: _PROPERTIES),
        (torch.cuda, "Stream", _Nothing),
        (torch.cuda, "Event", _Nothing),
        (torch.cuda, "current_stream", lambda *_: _Nothing()),
        (torch.cuda, "default_stream", lambda *_: _Nothing()),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "empty_cache", lambda: None),
        (torch.accelerator, "synchronize", lambda *_: None),
    )


_PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=MEMORY,
    multi_processor_count=PROCESSORS,
    is_integrated=False,
    shared_memory_per_block_optin=232448,
    warp_size=32,
    L2_cache_size=50 << 20,
)


_find_operator = torch._ops._OpNamespace.__getattr__


def _operator(self: Any, name: str) -> Any:
    """Return an operator, or a placeholder for an operator of vLLM's CUDA build."""
    try:
        return _find_operator(self, name)
    except AttributeError:
        if name == "get_workspace_size":
            return lambda *_: 0
        if self.name.startswith("_") and "_C" in self.name:
            return any_class(name)
        raise


def _autotuner_config(
    arguments: dict[str, Any], num_warps: int = 4, num_stages: int = 3, **more: Any
) -> SimpleNamespace:
    return SimpleNamespace(kwargs=arguments, num_warps=num_warps, num_stages=num_stages, **more)


class _Nothing:
    """Stands in for a CUDA stream or event, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def _never_called(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("planning calls no kernel")


@contextmanager
def _cuda_modules() -> Iterator[None]:
    """Let vLLM's modules import packages and extensions of CUDA that this machine lacks."""
    finder = FakeModules(
        lambda name: (
            (name.startswith("vllm.") and name.endswith(_EXTENSIONS))
            or any(f"{name}.".startswith(f"{package}.") for package in _PACKAGES)
        )
    )
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in finder.loaded:
            sys.modules.pop(name, None)
