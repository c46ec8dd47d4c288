# SPDX-License-Identifier: Apache-2.0
"""The patches that replace vLLM's attention backend TURBOQUANT by ours."""

from __future__ import annotations

from typing import Any

import vllm.platforms
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_hybrid_kv.attention.unsupported import (
    Refusal,
    UnsupportedLayerError,
    refuse_selection,
)
from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.patches.context import Context
from vllm_hybrid_kv.patches.mechanism import Edit, Patch
from vllm_hybrid_kv.settings import Settings

logger = init_logger("vllm.hybrid_kv.attention")

BACKEND_PATH = "vllm_hybrid_kv.attention.backend.K8V4AttentionBackend"


class BackendRegistration(Edit):
    """Registers our backend class under vLLM's name TURBOQUANT.

    vLLM has one backend name for all TurboQuant presets. An engine with a preset other than k8v4
    gets vLLM's own backend, as without the plugin.
    """

    _ours = True

    def problems(self) -> list[str]:
        """Return a problem if another plugin took the name, or if vLLM's slots differ from ours.

        vLLM aligns the blocks of hybrid models with its own slot sizes, even if our backend is
        registered. Read these sizes from `TurboQuantConfig`, because importing vLLM's backend would
        import FlashAttention.
        """
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        backend = AttentionBackendEnum.TURBOQUANT
        if backend.is_overridden():
            return [f"the backend {backend.name} already is {backend.get_path()}"]
        planned = {
            size: TurboQuantConfig.from_cache_dtype(CACHE_DTYPE, size).slot_size_aligned
            for size in k8v4.HEAD_SIZES
        }
        return [
            f"vLLM plans {slot} bytes for a slot of head size {size}, k8v4 has "
            f"{k8v4.slot_bytes(size)}"
            for size, slot in planned.items()
            if slot != k8v4.slot_bytes(size)
        ]

    def apply(self) -> None:
        register_backend(AttentionBackendEnum.TURBOQUANT, BACKEND_PATH)

    def on_engine_config(self, vllm_config: VllmConfig, _: Settings) -> None:
        """Register our backend, or restore vLLM's if the engine has another TurboQuant preset."""
        dtype = vllm_config.cache_config.cache_dtype
        self._ours = dtype == CACHE_DTYPE or not str(dtype).startswith("turboquant_")
        if self._ours:
            self.apply()
        else:
            self.undo()

    def failures(self) -> list[str]:
        path = AttentionBackendEnum.TURBOQUANT.get_path()
        return [f"the backend TURBOQUANT is {path}"] if (path == BACKEND_PATH) != self._ours else []

    def undo(self) -> None:
        AttentionBackendEnum.TURBOQUANT.clear_override()

    def __str__(self) -> str:
        return "AttentionBackendEnum.TURBOQUANT"


def registration_patch(context: Context) -> Patch:
    """Register our backend for engines with a k8v4 cache."""
    registration = BackendRegistration()
    context.on_engine_config.append(registration.on_engine_config)
    return Patch(
        "attention_backend",
        replaces="the class behind AttentionBackendEnum.TURBOQUANT, for turboquant_k8v4",
        why="vLLM's own backend has no CPU kernels, and on GPUs reads each KV byte once for every "
        "query head; register_backend is vLLM's way to replace a backend",
        upstream="vllm-project/vllm#49465 (TurboQuant on CPUs), #55610 (its speed on GPUs)",
        until="vLLM serves turboquant_k8v4 on CPUs and GPUs as fast",
        edits=[registration],
    )


def refusal_patch(context: Context) -> Patch:
    """Stop with a one-line error at a k8v4 layer that no backend can serve, on every device.

    The patched selector starts with an empty cache, so vLLM repeats earlier selections.
    """

    def select(
        original: Any, backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        k8v4_cache = attn_selector_config.kv_cache_dtype == CACHE_DTYPE
        if k8v4_cache and (refusal := refuse_selection(attn_selector_config)) is not None:
            raise UnsupportedLayerError(refusal)
        try:
            return original(backend, attn_selector_config, *args, **kwargs)
        except ValueError:
            if k8v4_cache and (reasons := _reasons_against(backend, attn_selector_config)):
                raise UnsupportedLayerError(Refusal("; ".join(reasons))) from None
            raise

    return Patch(
        "layer_refusals",
        replaces="the attention selector's _cached_get_attn_backend, for turboquant_k8v4",
        why="vLLM lists every backend, but names neither the layer nor a way out",
        until="vLLM says in one line which layer cannot be served with a cache dtype, and why",
        edits=[context.rebind("_cached_get_attn_backend", select)],
    )


def _reasons_against(backend: AttentionBackendEnum | None, config: Any) -> list[str]:
    """Return why our backend was not chosen, or why it cannot serve the layer on this device."""
    if backend not in (None, AttentionBackendEnum.TURBOQUANT):
        return [f"the chosen backend {backend.name} cannot read k8v4 pages"]
    reasons: list[str] = AttentionBackendEnum.TURBOQUANT.get_class().validate_configuration(
        device_capability=vllm.platforms.current_platform.get_device_capability(),
        **config._asdict(),
    )
    return reasons


def selection_patch(context: Context) -> Patch:
    """Select our backend for k8v4 layers on CPUs."""

    def get_attn_backend_cls(
        original: Any,
        cls: type,
        selected_backend: AttentionBackendEnum | None,
        attn_selector_config: Any,
        num_heads: int | None = None,
    ) -> Any:
        dtype = attn_selector_config.kv_cache_dtype
        if dtype == CACHE_DTYPE:
            if selected_backend not in (None, AttentionBackendEnum.TURBOQUANT):
                # Do not raise: in some modes, vLLM itself passes a backend that it ignores on CPUs.
                logger.info(
                    "Cannot use %s backend for a %s cache on CPU; using TURBOQUANT instead.",
                    *(selected_backend, dtype),
                )
            return AttentionBackendEnum.TURBOQUANT.get_path()
        refuse_without_cpu_kernels(dtype)
        return original(cls, selected_backend, attn_selector_config, num_heads)

    return Patch(
        "backend_selection",
        replaces="CpuPlatform.get_attn_backend_cls for layers with a turboquant cache",
        why="it knows one backend, which misreads k8v4 pages (0.32), or refuses k8v4 (0.33)",
        upstream="vllm-project/vllm#49465 (TurboQuant on CPUs)",
        until="CPU platforms select among registered backends by their supports_* methods",
        edits=[context.rebind("CpuPlatform.get_attn_backend_cls", get_attn_backend_cls)],
    )


def gemma4_heads_patch(context: Context) -> Patch:
    """Let each layer of a Gemma 4 model with a k8v4 cache select its own backend."""

    def verify_and_update_config(original: Any, vllm_config: VllmConfig) -> None:
        attention = vllm_config.attention_config
        chosen_by_user = attention.backend is not None
        original(vllm_config)
        if vllm_config.cache_config.cache_dtype == CACHE_DTYPE and not chosen_by_user:
            attention.backend = None

    return Patch(
        "gemma4_heads",
        replaces="Gemma4Config.verify_and_update_config, whose forced backend is undone for "
        "turboquant_k8v4",
        why="without FlashAttention 4 it forces TRITON_ATTN, which cannot read k8v4 pages, and "
        "vLLM raises if a forced backend does not fit",
        until="vLLM forces a backend only on layers that it fits",
        edits=[context.rebind("Gemma4Config.verify_and_update_config", verify_and_update_config)],
    )


def refuse_without_cpu_kernels(dtype: str | None) -> None:
    """Raise an error for a TurboQuant dtype other than k8v4, because it has no CPU kernels."""
    if str(dtype).startswith("turboquant_") and dtype != CACHE_DTYPE:
        raise HybridKVError(
            f"--kv-cache-dtype {dtype} has no CPU kernels; use {CACHE_DTYPE}, fp8 or auto"
        )
