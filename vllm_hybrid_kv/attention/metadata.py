# SPDX-License-Identifier: Apache-2.0
"""What one step's layers share: vLLM's batch, as the k8v4 kernels take it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    max_decode_query_len,
)

from vllm_hybrid_kv.attention.kernel_factory import kernels_for
from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec


@dataclass
class K8V4Metadata(AttentionMetadata):
    """What one step's layers of one KV group share. All tensors are on the device.

    Lengths are the exact ones that the model runner keeps on the device. The bounds that it has
    on the host, which count rejected draft tokens as accepted, are never used.

    Attributes:
        num_tokens: Tokens of the step; with those that pad a captured graph.
        max_query_len: New tokens of a request at most.
        query_start_loc: int32 [B + 1], offsets of the requests' tokens.
        seq_lens: int32 [B], exact lengths including the step's tokens.
        block_table: int32 [B, max blocks].
        causal: Whether queries see only what stands before them.
        plans: How the kernels divide the work, by what the plan depends on; made by the first
            layer that needs one.
    """

    num_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    causal: bool
    plans: dict[Hashable, Any]


class K8V4MetadataBuilder(AttentionMetadataBuilder[K8V4Metadata]):
    """Builds a step's metadata from vLLM's, for both of its model runners.

    Nothing of a step is computed here: the plan of the work is made on the device, by the first
    layer, from the tensors that the runner writes anew for every step. A captured graph contains
    that and so follows lengths that change.
    """

    # Groups of equal specs differ in their block tables alone.
    supports_update_block_table = True
    supports_draft_decode_metadata_update = True

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._decode_query_len = max_decode_query_len(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        # Compiled and tested while the engine starts, not in its first request.
        kernels_for(device, STATE.settings).warm_up(
            {name: layer.impl for name, layer in layers.items()},
            kv_cache_spec,
            vllm_config.model_config.dtype,
            device,
            max_requests=vllm_config.scheduler_config.max_num_seqs,
        )

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Return that batches with equal numbers of new tokens can be captured, on GPUs."""
        if current_platform.is_cuda_alike():
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.NEVER

    @classmethod
    def get_varlen_cudagraph_max_query_len(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> int | None:
        """Return how many new tokens a request may have in a replayed decode graph.

        The plan inside the graph reads them from the device.
        """
        return max_decode_query_len(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> K8V4Metadata:
        """Return the metadata of one step.

        Raises:
            ValueError: The batch mixes causal and bidirectional requests.
        """
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise ValueError(
                f"layers {', '.join(self.layer_names)}: a batch that mixes causal and "
                f"bidirectional requests cannot be served from a {CACHE_DTYPE} cache; serve the "
                "model with --kv-cache-dtype auto"
            )
        return K8V4Metadata(
            num_tokens=common.num_actual_tokens,
            # Adaptive verification spreads its drafts otherwise on the device than on the host.
            max_query_len=max(common.max_query_len, self._decode_query_len),
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            causal=common.causal,
            plans={},
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> K8V4Metadata:
        """Return the metadata of a batch that is captured; its lengths are as short as they can be.

        They are the runner's own tensor, which it writes before each replay.
        """
        metadata = self.build(0, common_attn_metadata)
        # vLLM gives the longest that there may be, which the runs before a capture would attend to.
        metadata.seq_lens.fill_(metadata.max_query_len)
        return metadata

    def update_block_table(
        self, metadata: K8V4Metadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> K8V4Metadata:
        """Return the metadata of another KV group of the same spec; plans are shared."""
        return replace(metadata, block_table=blk_table)

    def update_draft_decode_metadata(self, metadata: K8V4Metadata) -> None:
        """Forget plans, for a draft's next token has other lengths; layers make new ones."""
        metadata.plans.clear()
