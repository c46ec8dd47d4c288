# SPDX-License-Identifier: Apache-2.0
"""The functions of vLLM that the plugin patches or relies on, with a source hash for each minor.

`make drift VLLM=...` compares these tables with a release; DRIFT_ARGS=--write updates them.
"""

from __future__ import annotations

from vllm_hybrid_kv.patches.mechanism import Target

MINORS = ("0.32", "0.33")
"""The supported minors of vLLM. Each has a column in the tables."""

SUPPORTED = " and ".join(MINORS)

Table = dict[str, dict[str, tuple[str | None, ...]]]
"""By module and function: a hash for each minor, or None if the module lacks the function."""

# The hash of `initialize_model` covers only its decorator's wrapper. That is enough, because the
# patch only calls the function and checks the layers that it builds.
PATCHED: Table = {
    "vllm.config.compilation": {
        "CompilationConfig.resolve_cudagraph_mode_and_sizes": (
            "ee74aeb7a2896858",
            "ee74aeb7a2896858",
        )
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.base": {
        "KVConnectorBase_V1.bind_kv_cache_manager": ("6846244bd3f3241f", "6846244bd3f3241f")
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.example_connector": {
        "ExampleConnector.__init__": ("d3e9436607777ed5", "d3e9436607777ed5")
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata": {
        "compute_nixl_compatibility_hash": ("4b063e3460344c34", "4b063e3460344c34")
    },
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.config": {
        "build_offloading_config": ("2cf4ae4cfc3c286f", "29d16c9d564a6403")
    },
    "vllm.engine.arg_utils": {
        "EngineArgs.create_engine_config": ("d132c6caf48d4914", "3e19b2ef611bdae8")
    },
    "vllm.model_executor.layers.attention.attention": {
        "Attention.__init__": ("aa7d2d1b78ed9ceb", "4a5707fd62bbbc69")
    },
    "vllm.model_executor.layers.quantization.turboquant.config": {
        "TurboQuantConfig.get_boundary_skip_layers": ("0432bb2cbfb9fd65", "0432bb2cbfb9fd65")
    },
    "vllm.model_executor.model_loader.utils": {
        "initialize_model": ("2bdd984927e70605", "2bdd984927e70605")
    },
    "vllm.model_executor.models.config": {
        "Gemma4Config.verify_and_update_config": ("1ae0464f7090f1fd", "5b5eaee1eeff9654")
    },
    "vllm.platforms.cpu": {
        "CpuPlatform.get_attn_backend_cls": ("d04c31e09d1a67ce", "91da3a4d6e0ad421")
    },
    "vllm.platforms.interface": {
        "Platform._align_heterogeneous_kv_block_size": ("86ebbd8be1a4bf67", "c625dd669afa8cee"),
        "Platform._align_hybrid_block_size": ("515dcf9a651dc981", "12abcafa19901797"),
        "Platform.validate_environ": ("4e0b7df82b309d73", "4e0b7df82b309d73"),
    },
    "vllm.v1.attention.selector": {
        "_cached_get_attn_backend": ("e9717be527e12b42", "e9717be527e12b42")
    },
    "vllm.v1.core.kv_cache_coordinator": {
        "get_kv_cache_coordinator": ("618cb5426b873088", "2294e5b6fadd7d11")
    },
    "vllm.v1.core.kv_cache_manager": {
        "KVCacheManager.__init__": ("6d90764e9f0f3cf2", "666129fc19e4d275")
    },
    "vllm.v1.core.kv_cache_planning": {
        "get_kv_cache_groups": (None, "abb09ca9630ec32c"),
        "unify_kv_cache_spec_page_size": (None, "607c52c16b200bb1"),
    },
    "vllm.v1.core.kv_cache_utils": {
        "get_kv_cache_capacity": ("81cbcc96abc5fcc6", "81cbcc96abc5fcc6"),
        "get_kv_cache_groups": ("d74563dbf4d1465e", None),
        "resolve_kv_cache_block_sizes": ("eec76ee7844aa155", "eec76ee7844aa155"),
        "resolve_none_hash_seed": ("5a4908813819f2ec", "5a4908813819f2ec"),
        "unify_kv_cache_spec_page_size": ("607c52c16b200bb1", None),
    },
    "vllm.v1.engine.utils": {"wait_for_engine_startup": ("427c92904b59e91d", "612000fd2d8cc72a")},
    "vllm.v1.kv_offload.factory": {
        "OffloadingSpecFactory.get_spec_cls": ("a381786cc04dc9c5", "a381786cc04dc9c5")
    },
    "vllm.v1.worker.gpu_input_batch": {
        "InputBatch.add_request": ("c7c44acb74fbcfd3", "c7c44acb74fbcfd3")
    },
    "vllm.v1.worker.utils": {
        "copy_kv_cache_blocks_inplace": ("c41e0cc1a179c6ae", "c41e0cc1a179c6ae")
    },
    "vllm.v1.worker.worker_base": {
        "WorkerBase.__init__": ("20f92c08edc2ca06", "20f92c08edc2ca06"),
        "WorkerWrapperBase.initialize_from_config": ("672ea392c68cfbdd", "672ea392c68cfbdd"),
    },
}
"""The functions that are patched, or whose behaviour a patch depends on."""

RELIED_ON: Table = {
    "vllm.v1.core.block_pool": {
        "BlockHashToBlockMap.insert": ("6303d7d4d73e9820", "6303d7d4d73e9820"),
        "BlockHashToBlockMap.pop": ("9d63f827ca0a59eb", "9d63f827ca0a59eb"),
        "BlockPool._maybe_evict_cached_block": ("b503fc39d33718cc", "b503fc39d33718cc"),
        "BlockPool.cache_full_blocks": ("f9e1ec53d644c108", "957a84b978434803"),
        "BlockPool.emit_cached_block_events": ("019126a87a735bb4", "4b72c9ffbc780e7e"),
        "BlockPool.evict_blocks": ("30ff603d1ad4d33e", "30ff603d1ad4d33e"),
        "BlockPool.reset_prefix_cache": ("4ebcfcca3198ce00", "4ebcfcca3198ce00"),
    },
    "vllm.v1.core.kv_cache_coordinator": {
        "HybridKVCacheCoordinator._cache_hit_alignment_tokens": (
            "ac6b69e0196dc553",
            "ac6b69e0196dc553",
        ),
        "HybridKVCacheCoordinator.verify_and_split_kv_cache_groups": (
            "bff9a68beef5c410",
            "acb5a91afcab33bd",
        ),
    },
    "vllm.v1.core.kv_cache_utils": {
        "FreeKVCacheBlockQueue.__init__": ("f4d1b7ab4c56de44", "f4d1b7ab4c56de44"),
        "FreeKVCacheBlockQueue.append_n": ("c9158eb35d5e623b", "c9158eb35d5e623b"),
        "FreeKVCacheBlockQueue.popleft_n": ("fe6aad6a87a7650a", "fe6aad6a87a7650a"),
        "FreeKVCacheBlockQueue.prepend_n": ("1a363f783b880be4", "1a363f783b880be4"),
        "FreeKVCacheBlockQueue.remove": ("09a4f8a0f93902cd", "09a4f8a0f93902cd"),
    },
    "vllm.v1.core.sched.scheduler": {
        "Scheduler._mamba_block_aligned_split": ("b13c58409c0570f9", "816f905bbf46c72d")
    },
    "vllm.v1.core.single_type_kv_cache_manager": {
        "MambaManager._cache_partial_tail_block": ("5866aa42ddf1d5b8", "50dffd6f704e5495"),
        "MambaManager.allocate_new_blocks": ("f531003f42af7a3e", "f531003f42af7a3e"),
        "MambaManager.cache_blocks": ("4ed5cd2e36a7b15a", "4ed5cd2e36a7b15a"),
        "MambaManager.finalize_partial_tail_offload": ("ef151ad3184553cb", "ef151ad3184553cb"),
        "MambaManager.get_num_blocks_to_allocate": ("f9506775bf924929", "2bd2db3c5101f6b6"),
        "MambaManager.pop_blocks_for_free": ("f86ace789531cfa4", "f86ace789531cfa4"),
        "SingleTypeKVCacheManager._apply_cow": ("c95ae41f0d55ae84", "c95ae41f0d55ae84"),
        "SingleTypeKVCacheManager.add_local_computed_blocks": (
            "af499f7a38eb5eba",
            "af499f7a38eb5eba",
        ),
        "SingleTypeKVCacheManager.cache_blocks": ("6fbbfaa71f6719a0", "2c769a043be4cc63"),
        "SingleTypeKVCacheManager.take_pending_cow_copies": (
            "7fbce9950580287a",
            "7fbce9950580287a",
        ),
        "SlidingWindowManager._contiguous_blocks_for_hit": ("f22c02c6fa72ceaa", "f22c02c6fa72ceaa"),
    },
}
"""The methods of vLLM that define the private members that the coordinator uses."""

OFFLOADING: Table = {
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler": {
        "OffloadingConnectorScheduler.__init__": ("0c98e15b531804a0", "ceeeca36898080a5"),
        "OffloadingConnectorScheduler._build_partial_tail_store_jobs": (
            "4a0269bed5924e78",
            "3ab9aa39459c4a65",
        ),
        "OffloadingConnectorScheduler._build_store_jobs": ("90fc13bc2ad9ad9a", "cef70f7339002585"),
        "OffloadingConnectorScheduler._lookup": ("ea832a4bad98411a", "1b1889f59948d048"),
        "OffloadingConnectorScheduler._update_req_states": ("8c10fc1653f3d67a", "ce9d5dc9933e77f1"),
        "OffloadingConnectorScheduler.build_connector_meta": (
            "f4e503b3ba21d60f",
            "4409fa5296bde894",
        ),
        "OffloadingConnectorScheduler.get_num_new_matched_tokens": (
            "8f30a562b9f48464",
            "7338ec53fed3e458",
        ),
        "OffloadingConnectorScheduler.reset_cache": ("33808e5313ec5e98", "9c0b4487b6debfdf"),
        "OffloadingConnectorScheduler.update_connector_output": (
            "f4f8571b3201a424",
            "a0f2e02247f799a4",
        ),
        "OffloadingConnectorScheduler.update_state_after_alloc": (
            "770f1238dba54c09",
            "9a1e32bcc2c3fe16",
        ),
    },
    "vllm.v1.kv_offload.cpu.manager": {
        "CPUOffloadingManager._prepare_load": ("d205143114d8dfe0", "d205143114d8dfe0"),
        "CPUOffloadingManager.complete_load": ("5e00a3e12e804f63", "5e00a3e12e804f63"),
        "CPUOffloadingManager.complete_store": ("e0eb1f368de28484", "cd0039ed39d4a449"),
        "CPUOffloadingManager.lookup": ("506deea464d20ddb", "506deea464d20ddb"),
        "CPUOffloadingManager.prepare_load": ("c312ff7de99be7b9", "c312ff7de99be7b9"),
        "CPUOffloadingManager.prepare_store": ("55e3573796dbf80f", "2e9702bee7939fd6"),
        "CPUOffloadingManager.reset_cache": ("5471c415a2297362", "5471c415a2297362"),
    },
    "vllm.v1.kv_offload.cpu.shared_offload_region": {
        "SharedOffloadRegion.__init__": ("952bfaa11606b34e", "3828730200c32aef"),
        "SharedOffloadRegion.cleanup": ("90c2382eea9633fd", "e2a49b2e90e84bad"),
    },
    "vllm.v1.kv_offload.cpu.spec": {
        "CPUOffloadingSpec.__init__": ("dbfd2b6127217151", "39527791839f805f"),
        "CPUOffloadingSpec.get_manager": ("f32904e039476530", "701c7b83f6a6cea2"),
    },
    "vllm.v1.kv_offload.tiering.spec": {
        "TieringOffloadingSpec.get_manager": ("f71c76d49d0b699d", "46ae2f8e15374aaf")
    },
}
"""The methods that `transfer` relies on. They are checked only in engines with OffloadingConnector,
because other processes do not import their modules."""


def targets_of(minor: str, table: Table = PATCHED) -> dict[str, Target]:
    """Return the targets of a table for a supported minor, by `function` or `Class.method`."""
    column = MINORS.index(minor)
    return {
        name: Target(module, name, source)
        for module, functions in table.items()
        for name, hashes in functions.items()
        if (source := hashes[column]) is not None
    }
