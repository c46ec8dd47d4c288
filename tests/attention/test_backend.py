# SPDX-License-Identifier: Apache-2.0
"""The backend passes vLLM's batches to the kernels with exact lengths, without padding."""

from unittest.mock import Mock

import pytest
import torch
from vllm.config import ParallelConfig
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

from testing.attention.steps import Step, common_metadata
from vllm_hybrid_kv.attention.backend import (
    K8V4AttentionBackend,
    K8V4AttentionImpl,
    K8V4MetadataBuilder,
    refuse_rocm_gpu,
)
from vllm_hybrid_kv.attention.flash import FlashAttention
from vllm_hybrid_kv.attention.unsupported import UnsupportedLayerError
from vllm_hybrid_kv.kernels import k8v4, reference

HEADS, KV_HEADS, HEAD_SIZE, PAGE = 8, 2, 64, 32
BF16_TOLERANCE = 2**-8
"""Outputs of about 1 are rounded to bf16, which costs up to 2^-9. The other half of the
tolerance is for weights, which the kernel rounds to 15-bit integers. Scores are exact."""


def spec(cls=FullAttentionSpec, **changes):
    fields = {
        "block_size": 16,
        "num_kv_heads": 2,
        "head_size": 256,
        "dtype": torch.uint8,
        "kv_quant_mode": KVQuantMode.TURBOQUANT_K8V4,
    }
    return cls(**{**fields, **changes})


@pytest.mark.parametrize("head_size", [64, 80, 128, 256, 512])
def test_a_page_has_the_size_that_stock_plans(head_size):
    ours = K8V4AttentionBackend.customize_spec(spec(head_size=head_size))
    stock = TurboQuantAttentionBackend.customize_spec(spec(head_size=head_size))
    assert ours.page_size_bytes == stock.page_size_bytes
    assert ours.page_size_bytes == 16 * 2 * k8v4.slot_bytes(head_size)


def test_an_unquantised_layer_keeps_its_spec():
    plain = spec(dtype=torch.bfloat16, kv_quant_mode=KVQuantMode.NONE)
    assert K8V4AttentionBackend.customize_spec(plain) is plain


def test_keys_and_values_of_different_sizes_are_refused():
    with pytest.raises(UnsupportedLayerError, match="keys have 256 dims and its values 64"):
        K8V4AttentionBackend.customize_spec(spec(head_size_v=64))


def layer(**changes):
    parameters = {
        "num_heads": HEADS,
        "head_size": HEAD_SIZE,
        "scale": HEAD_SIZE**-0.5,
        "num_kv_heads": KV_HEADS,
        "kv_cache_dtype": "turboquant_k8v4",
    }
    return K8V4AttentionImpl(**{**parameters, **changes})


def builder():
    # The constructor needs an engine configuration and compiles kernels; `build` needs neither.
    made = object.__new__(K8V4MetadataBuilder)
    made.layer_names = ["model.layers.3.self_attn.attn"]
    made._decode_query_len = 1
    made._parallel_config = ParallelConfig()
    return made


def batch(seq_lens, query_lens, causal=True, padding=0):
    # The host knows only upper bounds of the lengths. Results must not depend on the bounds.
    common, _ = common_metadata(Step(tuple(seq_lens), tuple(query_lens), bound=7), PAGE)
    common.causal = causal
    common.slot_mapping = torch.cat([common.slot_mapping, torch.full((padding,), -1)])
    return common


def run(impl, common, tokens, seed=0):
    """Fill the cache, then run one step with the backend and with the reference."""
    generator = torch.Generator().manual_seed(seed)

    def noise(count, heads):
        return torch.randn(count, heads, HEAD_SIZE, generator=generator, dtype=torch.bfloat16)

    pages = int(common.block_table_tensor.max()) + 1
    cache = torch.zeros(pages, KV_HEADS, PAGE, k8v4.slot_bytes(HEAD_SIZE), dtype=torch.uint8)
    past = pages * PAGE
    impl.do_kv_cache_update(
        None, noise(past, KV_HEADS), noise(past, KV_HEADS), cache, torch.arange(past)
    )
    query = noise(tokens, HEADS)
    key, value = noise(tokens, KV_HEADS), noise(tokens, KV_HEADS)
    impl.do_kv_cache_update(None, key, value, cache, common.slot_mapping)
    output = torch.full((tokens, HEADS, HEAD_SIZE), 77.0, dtype=torch.bfloat16)
    metadata = builder().build(0, common)
    impl.forward(None, query, key, value, cache, metadata, output)
    expected, _ = reference.paged_attention(
        query[: common.num_actual_tokens],
        cache,
        common.block_table_tensor,
        common.seq_lens,
        common.query_start_loc,
        k8v4.Layout.CPU_TILED,
        scale=impl.scale,
        causal=common.causal,
        window=impl.sliding_window,
        soft_cap=impl.soft_cap,
        sinks=impl.sinks,
    )
    return output, expected, metadata


@pytest.mark.parametrize("causal", [True, False])
def test_a_mixed_batch_attends_with_exact_lengths(causal):
    common = batch([70, 1, 33, 40], [1, 1, 33, 4], causal=causal)
    output, expected, _ = run(layer(), common, 39)
    torch.testing.assert_close(output.float(), expected, atol=BF16_TOLERANCE, rtol=BF16_TOLERANCE)


def test_window_soft_cap_and_sinks_of_the_layer_reach_the_kernel():
    impl = layer(sliding_window=20, logits_soft_cap=0.5, sinks=torch.randn(HEADS) + 1)
    output, expected, _ = run(impl, batch([70, 50], [1, 5]), 6)
    torch.testing.assert_close(output.float(), expected, atol=BF16_TOLERANCE, rtol=BF16_TOLERANCE)


def test_padding_tokens_are_neither_stored_nor_attended_to():
    common = batch([40, 12], [1, 1], padding=3)
    output, expected, _ = run(layer(), common, 5)
    torch.testing.assert_close(
        output[:2].float(), expected, atol=BF16_TOLERANCE, rtol=BF16_TOLERANCE
    )
    assert (output[2:] == 77.0).all()


def test_layers_with_another_window_head_count_or_flash_attention_have_their_own_plan():
    common = batch([70], [1])
    metadata = builder().build(0, common)
    cache = torch.zeros(3, KV_HEADS, PAGE, k8v4.slot_bytes(HEAD_SIZE), dtype=torch.uint8)
    with_flash = layer()
    with_flash.flash = FlashAttention(2, Mock())
    for impl in (layer(), layer(sliding_window=20), layer(num_heads=4), with_flash, layer()):
        query = torch.randn(1, impl.num_heads, HEAD_SIZE, dtype=torch.bfloat16)
        impl.forward(None, query, query, query, cache, metadata, torch.empty_like(query))
    plans = {(HEADS, None, None), (HEADS, 20, None), (4, None, None), (HEADS, None, 2)}
    assert set(metadata.plans) == {(*key, False) for key in plans}


def test_profiling_without_metadata_returns_zeros():
    output = torch.full((3, HEADS, HEAD_SIZE), 5.0)
    layer().forward(None, output, output, output, torch.tensor([]), None, output)
    assert (output == 0).all()


def test_a_batch_that_mixes_causal_and_bidirectional_requests_is_refused_by_name():
    common = batch([4, 4], [4, 4])
    common.causal = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"model\.layers\.3\.self_attn\.attn.*mixes"):
        builder().build(0, common)


# When vLLM selects a backend for chunked local attention, it ignores `kv_cache_dtype_skip_layers`.
# So advice to skip the layer would not help.
@pytest.mark.parametrize("dtype", ["turboquant_4bit_nc", "auto"])
def test_another_cache_dtype_is_refused_without_the_advice_to_skip_the_layer(dtype):
    with pytest.raises(UnsupportedLayerError, match=f"KV cache dtype is {dtype}, ") as refused:
        layer(kv_cache_dtype=dtype)
    assert "skip" not in str(refused.value)
    assert "--kv-cache-dtype auto" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("gfx90a:sramecc+:xnack-", False),
        ("gfx908", False),
        ("gfx1100", False),
        ("gfx942:sramecc+:xnack-", True),
        ("gfx950", True),
    ],
)
def test_of_amds_gpus_gfx942_and_gfx950_are_served(name, served):
    message = (
        f"of AMD's GPUs the k8v4 kernels run on gfx942 and gfx950, not on {name}: older ones "
        "multiply the fp16 subnormals of value codes as zeros, and RDNA has no MFMA int8"
    )
    assert refuse_rocm_gpu(name) == (None if served else message)
