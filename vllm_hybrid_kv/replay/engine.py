# SPDX-License-Identifier: Apache-2.0
"""vLLM's planner and scheduler for a model that is described and never run.

The layers are built on PyTorch's meta device, by the model's own class, so that their KV cache
specs are the ones that an engine would plan with. No weights are read and none are allocated.

What is described is an engine on GPUs, whatever this machine is: `as_on_gpus` keeps its CPU from
having a say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.utils import customize_attention_spec

from vllm_hybrid_kv import plugin

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


@dataclass(frozen=True)
class Engine:
    """What an engine has before it runs a model.

    Attributes:
        vllm_config: The configuration.
        kv_cache_config: The plan.
        scheduler_block_size: What chunks of prompts are aligned to, in tokens.
        hash_block_size: What prefixes are matched by, in tokens.
    """

    vllm_config: VllmConfig
    kv_cache_config: KVCacheConfig
    scheduler_block_size: int
    hash_block_size: int

    @cached_property
    def scheduler(self) -> Scheduler:
        """The scheduler that an engine core would make."""
        return Scheduler(
            vllm_config=self.vllm_config,
            kv_cache_config=self.kv_cache_config,
            structured_output_manager=StructuredOutputManager(self.vllm_config),
            block_size=self.scheduler_block_size,
            hash_block_size=self.hash_block_size,
            log_stats=True,
        )


class Model:
    """A model's configuration and its layers' KV cache specs, with no weights."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Configure the model and build its layers.

        Args:
            arguments: For vLLM's `EngineArgs`: `model`, `kv_cache_dtype`, `block_size` and so on.
        """
        self._arguments = arguments
        # vLLM loads plugins once a process, and only those that VLLM_PLUGINS names.
        plugin.register()
        self.specs = self._layers()

    def _configure(self, settings: dict[str, Any] | None = None) -> VllmConfig:
        arguments = EngineArgs(
            skip_tokenizer_init=True,
            additional_config={} if settings is None else {"hybrid_kv": settings},
            **self._arguments,
        )
        with as_on_gpus():
            config = arguments.create_engine_config()
        config.cache_config.kv_cache_layout = "LBHNC"
        return config

    def _layers(self) -> dict[str, KVCacheSpec]:
        from vllm.distributed import (
            ensure_model_parallel_initialized,
            init_distributed_environment,
        )
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.utils.torch_utils import set_default_torch_dtype

        config = self._configure()
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(set_current_vllm_config(config))
            rendezvous = (Path(folder) / "rendezvous").as_uri()
            if not torch.distributed.is_initialized():
                init_distributed_environment(1, 0, rendezvous, 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            stack.enter_context(torch.device("meta"))
            stack.enter_context(set_default_torch_dtype(config.model_config.dtype))
            initialize_model(config)
            with as_on_gpus():
                current_platform.update_block_size_for_backend(config)
            self.block_size = config.cache_config.block_size
            self._mamba_block_size = config.cache_config.mamba_block_size
            self._mamba_page_size_padded = config.cache_config.mamba_page_size_padded
            layers = get_layers_from_vllm_config(config, AttentionLayerBase)
            return {
                name: spec
                for name, layer in layers.items()
                if (spec := _spec_of(layer, config)) is not None
            }

    def engine(self, memory: int, settings: dict[str, Any]) -> Engine:
        """Plan a cache and return what an engine would have.

        Args:
            memory: Bytes for the KV cache.
            settings: The plugin's.
        """
        config = self._configure(settings)
        cache = config.cache_config
        cache.block_size = self.block_size
        cache.mamba_block_size = self._mamba_block_size
        cache.mamba_page_size_padded = self._mamba_page_size_padded
        (plan,) = kv_cache_utils.get_kv_cache_configs(config, [dict(self.specs)], [memory])
        plan = kv_cache_utils.generate_scheduler_kv_cache_config([plan])
        cache.num_gpu_blocks = plan.num_blocks
        cache.block_size = min(
            group.kv_cache_spec.block_size
            for group in plan.kv_cache_groups
            if group.kv_cache_spec.prefix_cacheable
        )
        kv_cache_utils.update_kv_cache_capacity(config, plan)
        scheduler_block_size, hash_block_size = kv_cache_utils.resolve_kv_cache_block_sizes(
            plan, config
        )
        return Engine(config, plan, scheduler_block_size, hash_block_size)


@contextmanager
def as_on_gpus() -> Iterator[None]:
    """Have vLLM's platform for CPUs configure and align blocks as its platforms for GPUs do.

    There, states have the dtype that the model asks for; CPUs that multiply bfloat16 store float32.
    And blocks are multiples of 16 tokens, not of the 32 that vLLM's attention on CPUs works by.
    """
    if not current_platform.is_cpu():
        yield
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with ExitStack() as stack:
        stack.enter_context(
            patch.object(torch.cpu, "_is_avx512_bf16_supported", return_value=False)
        )
        stack.enter_context(
            patch.object(
                CPUAttentionBackend,
                "get_supported_kernel_block_sizes",
                staticmethod(lambda kv_cache_spec=None: [MultipleOf(16)]),
            )
        )
        yield


def _spec_of(layer: Any, config: VllmConfig) -> KVCacheSpec | None:
    """Return what the model runner would take as a layer's spec."""
    if getattr(layer, "kv_sharing_target_layer_name", None):
        return None
    spec: KVCacheSpec | None = layer.get_kv_cache_spec(config)
    if isinstance(spec, AttentionSpec):
        spec = customize_attention_spec(layer.get_attn_backend(), spec)
    return spec
