# SPDX-License-Identifier: Apache-2.0
"""A described NVIDIA GPU: vLLM's CUDA platform with fixed answers and no driver.

While it is installed, every module of vLLM that holds `current_platform` sees this GPU, because the
class of that one object is replaced. Nothing of the platform underneath can be reached.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
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
DEVICES_IN_A_NODE = 1 << 20
"""More than any parallel size: whether there are enough GPUs is not planned."""

_EXTENSIONS = ("_C", "_C_stable_libtorch")
_PACKAGES = (
    "cuda",
    "cutlass",
    "flashinfer",
    "quack",
    "tilelang",
    "torchaudio",
    "vllm.third_party.deep_gemm",
    "vllm.third_party.flashmla",
    "vllm.vllm_flash_attn.cute",
)
"""Packages that vLLM for CUDA requires or brings, and that may be missing or broken here."""


@contextmanager
def described_gpu() -> Iterator[None]:
    """Make vLLM configure and build for the described GPU, whatever this machine is.

    On a machine where vLLM runs on NVIDIA GPUs, its own platform stays.
    """
    platform = vllm.platforms.current_platform
    if platform.is_cuda():
        yield
        return
    # Compiler passes look for CUDA's operators where the platform is CUDA's. Nothing is compiled.
    importlib.import_module("vllm.compilation.backends")

    kind = type(platform)
    with ExitStack() as stack:
        stack.enter_context(_cuda_modules())
        described = _described_class()
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(_forget_answers)
        stack.callback(setattr, platform, "__class__", kind)
        platform.__class__ = described
        _forget_answers()
        for target, name, value in _available():
            stack.enter_context(patch.object(target, name, value, create=True))
        yield


@functools.cache
def _described_class() -> type[Platform]:
    from vllm.platforms.cuda import CudaPlatformBase

    class DescribedGpu(CudaPlatformBase):
        """One Hopper GPU of 80 GiB, the kind that vLLM's defaults for servers are made for."""

        device_name = NAME

        @classmethod
        def import_kernels(cls) -> None:
            pass

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*CAPABILITY)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return NAME

        @classmethod
        def get_device_uuid(cls, device_id: int = 0) -> str:
            return f"GPU-{device_id}"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return MEMORY

        @classmethod
        def get_cuda_runtime_major(cls) -> int:
            return 13

        @classmethod
        def device_count(cls) -> int:
            return DEVICES_IN_A_NODE

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return PROCESSORS

        @classmethod
        def is_fully_connected(cls, *_: Any) -> bool:
            return True

        @classmethod
        def is_integrated_gpu(cls, device_id: int = 0) -> bool:
            return False

        @classmethod
        def is_arch_support_pdl(cls) -> bool:
            return True

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False

        @classmethod
        def get_device_numa_node(cls, device_id: int = 0) -> int | None:
            return None

        @classmethod
        def get_all_device_numa_nodes(cls) -> list[int] | None:
            return None

        @classmethod
        def log_warnings(cls) -> None:
            pass

        @classmethod
        def get_valid_backends(cls, *args: Any, **kwargs: Any) -> Any:
            valid, refused = super().get_valid_backends(*args, **kwargs)
            # A package that this machine lacks says nothing of the GPU.
            told = {
                backend: (priority, reasons)
                for backend, (priority, reasons) in refused.items()
                if not any("Error: " in reason for reason in reasons)
            }
            return valid, told

    return DescribedGpu


def _restore_environment(before: dict[str, str]) -> None:
    """Undo what vLLM sets for one model, which would hold for the next; the plugin's stays."""
    for name in os.environ.keys() | before.keys():
        if "HYBRID_KV" in name:
            continue
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


def _forget_answers() -> None:
    """Clear what vLLM caches of a platform's answers and of the packages that it found."""
    from vllm.utils import deep_gemm, flashinfer, import_utils
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()
    for module in (deep_gemm, flashinfer, import_utils):
        for value in vars(module).values():
            if callable(value) and hasattr(value, "cache_clear"):
                value.cache_clear()


def _available() -> Iterator[tuple[Any, str, Any]]:
    """Give what a module would hold if CUDA's extensions had been there when it was imported."""
    import vllm.config.vllm
    from vllm import _custom_ops, triton_utils
    from vllm.utils import flashinfer
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.ops import flashmla
    from vllm.vllm_flash_attn import flash_attn_interface

    for name in ("FA2_AVAILABLE", "FA3_AVAILABLE", "FA4_AVAILABLE"):
        yield flash_attn_interface, name, True
    for name in ("_flashmla_C_AVAILABLE", "_flashmla_extension_C_AVAILABLE"):
        yield flashmla, name, True
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
            # Hopper's tensor cores multiply FP8; FP4 came later.
            yield _custom_ops, name, lambda *_, answer="fp4" not in name: answer
    yield torch._ops._OpNamespace, "__getattr__", _operator
    # FlashInfer's kernels come with it or are compiled by CUDA's compiler.
    yield flashinfer, "has_flashinfer_cubin", lambda: True
    # Decides which model runner a server has.
    yield vllm.config.vllm, "HAS_TRITON", True
    if not triton_utils.HAS_TRITON:
        # vLLM's placeholders for Triton have the names that modules use on CPUs.
        for kind in (type(triton_utils.triton), type(triton_utils.tl)):
            yield kind, "__getattr__", lambda _, name: any_class(name)
        yield triton_utils.triton, "Config", _config
    yield torch.cuda, "current_device", lambda: 0
    yield torch.cuda, "get_device_capability", lambda *_: CAPABILITY
    yield torch.cuda, "get_device_name", lambda *_: NAME
    yield torch.cuda, "get_device_properties", lambda *_: _PROPERTIES
    yield torch.accelerator, "current_device_index", lambda: 0
    yield torch.accelerator, "empty_cache", lambda: None
    yield torch.accelerator, "synchronize", lambda *_: None
    for name in ("Stream", "Event"):
        yield torch.cuda, name, _Nothing
    for name in ("current_stream", "default_stream"):
        yield torch.cuda, name, lambda *_: _Nothing()


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
    """Return an operator, or a name for one of vLLM's that only its CUDA build has."""
    try:
        return _find_operator(self, name)
    except AttributeError:
        if name == "get_workspace_size":
            return lambda *_: 0
        if self.name.startswith("_") and "_C" in self.name:
            return any_class(name)
        raise


def _config(
    arguments: dict[str, Any], num_warps: int = 4, num_stages: int = 3, **more: Any
) -> SimpleNamespace:
    """Return a choice of Triton's autotuner."""
    return SimpleNamespace(kwargs=arguments, num_warps=num_warps, num_stages=num_stages, **more)


class _Nothing:
    """A stream or an event of a GPU on which nothing runs."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def _never_called(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("a dry run calls no kernel")


@contextmanager
def _cuda_modules() -> Iterator[None]:
    """Give vLLM's modules what they import on CUDA and this machine lacks."""
    finders: tuple[FakeModules, ...] = _KernelPackages(), _EmptyExtensions()
    sys.meta_path[:0] = finders
    try:
        yield
    finally:
        for finder in finders:
            sys.meta_path.remove(finder)
            for name in finder.loaded:
                sys.modules.pop(name, None)


class _EmptyExtensions(FakeModules):
    """Empty modules instead of vLLM's compiled CUDA extensions."""

    def replaces(self, name: str) -> bool:
        return name.startswith("vllm.") and name.endswith(_EXTENSIONS)


class _KernelPackages(FakeModules):
    """Modules in which every name is a class, instead of kernel packages that need a GPU."""

    def replaces(self, name: str) -> bool:
        return any(f"{name}.".startswith(f"{package}.") for package in _PACKAGES)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == "flashinfer.mla":
            module.BatchMLAPagedAttentionWrapper = _LatentAttention  # type: ignore[attr-defined]
        module.__getattr__ = any_class  # type: ignore[method-assign]


class _LatentAttention:
    """FlashInfer's wrapper. vLLM reads the signature of `run` to learn what FlashInfer supports."""

    def run(self, *_: Any, ckv_scale_arr: Any = None) -> Any:
        return _never_called()
