# SPDX-License-Identifier: Apache-2.0
"""vLLM 0.32. Planning is in `kv_cache_utils`, and the CPU platform takes any cache dtype."""

from __future__ import annotations

from vllm_hybrid_kv.patches.adapter import Targets, build
from vllm_hybrid_kv.patches.base import Fingerprint, Patch, Target
from vllm_hybrid_kv.patches.context import Context

TARGETS = Targets(
    get_groups=Target(
        "vllm.v1.core.kv_cache_utils",
        "get_kv_cache_groups",
        Fingerprint("(vllm_config, kv_cache_spec)", "d74563dbf4d1465e"),
    ),
    unify=Target(
        "vllm.v1.core.kv_cache_utils",
        "unify_kv_cache_spec_page_size",
        Fingerprint("(kv_cache_spec)", "607c52c16b200bb1"),
    ),
    get_capacity=Target(
        "vllm.v1.core.kv_cache_utils",
        "get_kv_cache_capacity",
        Fingerprint("(vllm_config, kv_cache_config)", "81cbcc96abc5fcc6"),
    ),
    make_coordinator=Target(
        "vllm.v1.core.kv_cache_coordinator",
        "get_kv_cache_coordinator",
        Fingerprint(
            "(kv_cache_config, max_model_len, max_in_flight_tokens, use_eagle, "
            "enable_caching, enable_kv_cache_events, dcp_world_size, pcp_world_size, "
            "scheduler_block_size, hash_block_size, metrics_collector=None, "
            "num_prefill_lookahead=0, allow_partial_hash_hits=True)",
            "618cb5426b873088",
        ),
    ),
    init_kv_cache_manager=Target(
        "vllm.v1.core.kv_cache_manager",
        "KVCacheManager.__init__",
        Fingerprint(
            "(self, kv_cache_config, max_model_len, scheduler_block_size, hash_block_size, "
            "max_in_flight_tokens=None, enable_caching=True, use_eagle=False, "
            "num_prefill_lookahead=0, log_stats=False, enable_kv_cache_events=False, "
            "dcp_world_size=1, pcp_world_size=1, metrics_collector=None, watermark=0.0, "
            "enable_mamba_shared_prefix_checkpoint=False)",
            "6d90764e9f0f3cf2",
        ),
    ),
    resolve_block_sizes=Target(
        "vllm.v1.core.kv_cache_utils",
        "resolve_kv_cache_block_sizes",
        Fingerprint("(kv_cache_config, vllm_config)", "eec76ee7844aa155"),
    ),
    copy_blocks=Target(
        "vllm.v1.worker.utils",
        "copy_kv_cache_blocks_inplace",
        Fingerprint("(kv_caches, num_blocks, kv_cache_block_copies)", "c41e0cc1a179c6ae"),
    ),
    create_engine_config=Target(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        Fingerprint("(self, usage_context=None, headless=False)", "d132c6caf48d4914"),
    ),
    init_worker=Target(
        "vllm.v1.worker.worker_base",
        "WorkerBase.__init__",
        Fingerprint(
            "(self, vllm_config, local_rank, rank, distributed_init_method, "
            "is_driver_worker=False)",
            "20f92c08edc2ca06",
        ),
    ),
    validate_environ=Target(
        "vllm.platforms.interface",
        "Platform.validate_environ",
        Fingerprint("(cls, hard_fail)", "4e0b7df82b309d73"),
    ),
    get_attn_backend_cls=Target(
        "vllm.platforms.cpu",
        "CpuPlatform.get_attn_backend_cls",
        Fingerprint(
            "(cls, selected_backend, attn_selector_config, num_heads=None)", "d04c31e09d1a67ce"
        ),
    ),
    select_backend=Target(
        "vllm.v1.attention.selector",
        "_cached_get_attn_backend",
        Fingerprint(
            "(backend, attn_selector_config, num_heads=None, *, _run_kv_cache_dtype=None)",
            "e9717be527e12b42",
        ),
    ),
    get_boundary_layers=Target(
        "vllm.model_executor.layers.quantization.turboquant.config",
        "TurboQuantConfig.get_boundary_skip_layers",
        Fingerprint("(model_config, n=2)", "0432bb2cbfb9fd65"),
    ),
    verify_gemma4_config=Target(
        "vllm.model_executor.models.config",
        "Gemma4Config.verify_and_update_config",
        Fingerprint("(vllm_config)", "1ae0464f7090f1fd"),
    ),
    nixl_compatibility_hash=Target(
        "vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata",
        "compute_nixl_compatibility_hash",
        Fingerprint("(vllm_config, attn_backend_name, transfer_mode='pull')", "4b063e3460344c34"),
    ),
    none_hash_seed=Target(
        "vllm.v1.core.kv_cache_utils",
        "resolve_none_hash_seed",
        Fingerprint("(hash_fn)", "5a4908813819f2ec"),
    ),
    offloading_config=Target(
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading.config",
        "build_offloading_config",
        Fingerprint("(vllm_config, kv_cache_config)", "2cf4ae4cfc3c286f"),
    ),
    init_example_connector=Target(
        "vllm.distributed.kv_transfer.kv_connector.v1.example_connector",
        "ExampleConnector.__init__",
        Fingerprint("(self, vllm_config, role, kv_cache_config)", "d3e9436607777ed5"),
    ),
    cpu_refuses_dtypes=False,
    align_chunks=Target(
        "vllm.v1.core.sched.scheduler",
        "Scheduler._mamba_block_aligned_split",
        Fingerprint(
            "(self, request, num_new_tokens, num_new_local_computed_tokens=0, "
            "num_external_computed_tokens=0)",
            "b13c58409c0570f9",
        ),
    ),
    cache_prompt_end=Target(
        "vllm.v1.core.single_type_kv_cache_manager",
        "MambaManager._cache_partial_tail_block",
        Fingerprint("(self, request, num_tokens, retention_interval)", "5866aa42ddf1d5b8"),
    ),
    add_to_batch=Target(
        "vllm.v1.worker.gpu_input_batch",
        "InputBatch.add_request",
        Fingerprint("(self, request)", "c7c44acb74fbcfd3"),
    ),
    init_attention=Target(
        "vllm.model_executor.layers.attention.attention",
        "Attention.__init__",
        Fingerprint(
            "(self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, "
            "use_alibi_sqrt=None, cache_config=None, quant_config=None, logits_soft_cap=None, "
            "per_layer_sliding_window=None, prefix='', attn_type=<AttentionType.DECODER: "
            "'decoder'>, kv_sharing_target_layer_name=None, mm_prefix_clamp_sliding_window=False, "
            "attn_backend=None, head_size_v=None, **extra_impl_args)",
            "aa7d2d1b78ed9ceb",
        ),
    ),
    # A decorator's function: what it wraps is only called, and its result is checked.
    initialize_model=Target(
        "vllm.model_executor.model_loader.utils",
        "initialize_model",
        Fingerprint("(*args, **kwargs)", "2bdd984927e70605"),
    ),
    initialize_from_config=Target(
        "vllm.v1.worker.worker_base",
        "WorkerWrapperBase.initialize_from_config",
        Fingerprint("(self, kv_cache_configs)", "672ea392c68cfbdd"),
    ),
    align_hybrid=Target(
        "vllm.platforms.interface",
        "Platform._align_hybrid_block_size",
        Fingerprint("(cls, vllm_config, backend_cls)", "515dcf9a651dc981"),
    ),
    align_heterogeneous=Target(
        "vllm.platforms.interface",
        "Platform._align_heterogeneous_kv_block_size",
        Fingerprint("(cls, vllm_config, backend_cls)", "86ebbd8be1a4bf67"),
    ),
    resolve_cudagraph_mode=Target(
        "vllm.config.compilation",
        "CompilationConfig.resolve_cudagraph_mode_and_sizes",
        Fingerprint(
            "(self, min_cg_support, min_cg_attn_backend, uniform_decode_query_len=1, "
            "use_v2_model_runner=False, kv_cache_config=None, max_num_reqs=None, "
            "is_profiling=False, piecewise_capture_available=True)",
            "ee74aeb7a2896858",
        ),
    ),
    wait_for_engines=Target(
        "vllm.v1.engine.utils",
        "wait_for_engine_startup",
        Fingerprint(
            "(handshake_socket, core_engines, parallel_config, coordinated_dp, cache_config, "
            "launch)",
            "427c92904b59e91d",
        ),
    ),
)


def patches(context: Context) -> list[Patch]:
    """Return this minor's patches, not applied."""
    return build(context, TARGETS)
