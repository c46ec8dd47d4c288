# SPDX-License-Identifier: Apache-2.0
"""A layer that does not match its pages stops start-up with a message that names both."""

from dataclasses import replace

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVQuantMode,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_hybrid_kv.attention.backend import K8V4AttentionBackend
from vllm_hybrid_kv.attention.layer_check import (
    BuiltLayer,
    LayerPagesError,
    check_plan,
    check_views,
)

K8V4 = "turboquant_k8v4"
ADVICE = (
    ". Serve the model with --kv-cache-dtype auto or, if layers are left unquantised, "
    "set boundary_layers=0 and remove --kv-cache-dtype-skip-layers"
)


def spec(quantised=True, head_size=64, kv_heads=2, block_size=64, cls=FullAttentionSpec, **fields):
    """Make a spec as the model runner does, with the changes that the layer's backend asks for."""
    backend = K8V4AttentionBackend if quantised else CPUAttentionBackend
    return backend.customize_spec(
        cls(
            block_size=block_size,
            num_kv_heads=kv_heads,
            head_size=head_size,
            dtype=torch.uint8 if quantised else torch.bfloat16,
            kv_quant_mode=KVQuantMode.TURBOQUANT_K8V4 if quantised else KVQuantMode.NONE,
            **fields,
        )
    )


def layer(own=None, target=None, **fields):
    own = own or spec(**fields)
    quantised = own.kv_quant_mode.is_turboquant
    backend, dtype = ("TURBOQUANT", K8V4) if quantised else ("CPU_ATTN", "auto")
    return BuiltLayer(backend, dtype, own, target)


def group(own, *names):
    return KVCacheGroupSpec(list(names), own)


def problems(layers, *groups):
    with pytest.raises(LayerPagesError) as caught:
        check_plan(layers, groups)
    message = str(caught.value)
    assert message.endswith(ADVICE)
    return message.removesuffix(ADVICE)


def test_matching_layers_and_pages_pass():
    planned = replace(spec(), block_size=384, page_size_padded=2**18)
    layers = {
        "0": layer(quantised=False),
        "1": layer(),
        "2": layer(cls=SlidingWindowSpec, sliding_window=96),
        "3": layer(target="1"),
        "4": layer(cls=SlidingWindowSpec, sliding_window=96, target="2"),
    }
    check_plan(
        layers,
        [
            group(spec(quantised=False, block_size=128), "0"),
            # Layers 3 and 4 share pages of other layers. A plan may list such a layer or omit it.
            group(planned, "1", "3"),
            group(spec(cls=SlidingWindowSpec, sliding_window=96, block_size=128), "2"),
            group(STATE, "states"),
        ],
    )


def test_pages_of_different_sizes_in_one_group_are_compared_by_layer():
    own = {"0": spec(quantised=False), "1": spec(), "2": spec(head_size=128)}
    layers = {name: layer(own=value) for name, value in own.items()}
    planned = UniformTypeKVCacheSpecs(block_size=64, kv_cache_specs=own)
    check_plan(layers, [group(planned, *own)])
    mixed = UniformTypeKVCacheSpecs(block_size=64, kv_cache_specs={**own, "2": own["1"]})
    message = problems(layers, group(mixed, *own))
    assert message.startswith("layer 2 cannot use the pages of KV cache group 0, which it shares ")
    assert "its head size is 128, that of the pages is 64" in message


def test_pages_in_a_group_with_different_sizes_cannot_be_shared():
    own = {"0": spec(quantised=False), "1": spec()}
    layers = {name: layer(own=value) for name, value in own.items()} | {"2": layer(target="1")}
    planned = UniformTypeKVCacheSpecs(block_size=64, kv_cache_specs=own)
    message = problems(layers, group(planned, *own))
    assert message.startswith("layer 2 cannot use the pages of layer 1: vLLM does not share pages")
    assert "--disable-hybrid-kv-cache-manager" in message


@pytest.mark.parametrize("sharing_is_quantised", [True, False])
def test_a_sharing_layer_with_another_dtype_stops_start_up(sharing_is_quantised):
    layers = {
        "model.layers.5": layer(quantised=not sharing_is_quantised),
        "model.layers.9": layer(quantised=sharing_is_quantised, target="model.layers.5"),
    }
    message = problems(layers, group(layers["model.layers.5"].spec, "model.layers.5"))
    assert message.startswith("layer model.layers.9 cannot use the pages of layer model.layers.5: ")
    mine, pages = ("TURBOQUANT_K8V4", 100), ("NONE", 256)
    if not sharing_is_quantised:
        mine, pages = pages, mine
    assert f"its quantisation is {mine[0]}, that of the pages is {pages[0]}" in message
    assert f"its slot size in bytes is {mine[1]}, that of the pages is {pages[1]}" in message


def window(size):
    return {"cls": SlidingWindowSpec, "sliding_window": size}


def chunks(size):
    return {"cls": ChunkedLocalAttentionSpec, "attention_chunk_size": size}


STATE = MambaSpec(block_size=16, shapes=((8,),), dtypes=(torch.uint8,))


@pytest.mark.parametrize("target", [None, "a"], ids=["same group", "shared pages"])
@pytest.mark.parametrize(
    ("own", "planned", "words"),
    [
        ({}, spec(head_size=128), "its head size is 64, that of the pages is 128"),
        ({}, spec(kv_heads=4), "its number of KV heads is 2, that of the pages is 4"),
        ({}, spec(quantised=False), "its torch dtype is torch.uint8, that of the pages is torch.b"),
        ({}, spec(block_size=24), "its block must be a multiple of 16 tokens, that of the pages"),
        ({}, spec(**window(96)), "it attends to all tokens, the pages keep a window of 96 tokens"),
        (window(128), spec(**window(96)), "a window of 128 tokens, the pages keep a window of 96 "),
        (window(96), spec(**chunks(96)), "a window of 96 tokens, the pages keep chunks of 96 toke"),
        ({}, spec(**chunks(96)), "it attends to all tokens, the pages keep chunks of 96 tokens"),
        ({}, STATE, "it is an attention layer, and its pages are planned by a MambaSpec"),
    ],
)
def test_a_layer_with_other_pages_stops_start_up(own, planned, words, target):
    layers = {"b": layer(target=target, **own)}
    if isinstance(planned, AttentionSpec):
        layers["a"] = layer(own=planned)
    message = problems(layers, group(planned, "a", "b"))
    pages = f"layer {target}" if target else "KV cache group 0, which it shares with layer a"
    assert f"layer b cannot use the pages of {pages}: " in message
    assert words in message


@pytest.mark.parametrize("quantised", [True, False])
def test_a_boundary_or_skipped_layer_among_quantised_ones_stops_start_up(quantised):
    layers = {str(index): layer(quantised=index > 1) for index in range(4)}
    planned = spec(quantised=quantised)
    message = problems(layers, group(planned, *layers))
    wrong = {"0", "1"} if quantised else {"2", "3"}
    assert {part.split()[1] for part in message.split("; ")} == wrong


@pytest.mark.parametrize(
    ("layers", "listed", "message"),
    [
        (["1"], ["0", "1"], "KV cache group 0 lists layer 0, which this rank lacks"),
        (["0", "1"], ["0"], "layer 1 uses the pages of layer 1, which has none"),
    ],
)
def test_a_plan_must_list_exactly_the_layers_of_its_rank(layers, listed, message):
    assert problems(dict.fromkeys(layers, layer()), group(spec(), *listed)) == message


def test_a_layer_that_shares_pages_needs_its_target():
    message = problems({"9": layer(target="1")})
    assert message == "layer 9 uses the pages of layer 1, which has none"


@pytest.mark.parametrize("planned", [{}, window(128), window(96), {"sliding_window": 96}])
def test_pages_that_vllm_frees_later_than_needed_pass(planned):
    check_plan({"b": layer(**window(96))}, [group(spec(**planned), "b")])


@pytest.mark.parametrize(("quantised", "backend"), [(True, "CPU_ATTN"), (False, "TURBOQUANT")])
def test_a_backend_that_does_not_fit_the_dtype_stops_start_up(quantised, backend):
    mixed = replace(layer(quantised=quantised), backend=backend)
    message = problems({"a": mixed}, group(mixed.spec, "a"))
    assert f"its backend is {backend} and its cache dtype {mixed.cache_dtype}" in message


def view(*shape, dtype=torch.uint8):
    return torch.zeros(shape, dtype=dtype)


def test_tensors_of_the_k8v4_layout_pass():
    cache = view(3, 2, 32, 100)
    check_views({"a": layer(), "b": layer(target="a")}, {"a": cache, "b": cache.view(cache.shape)})
    # Padding between pages is accepted.
    check_views({"a": layer()}, {"a": view(3, 7000)[:, :6400].unflatten(1, (2, 32, 100))})
    check_views({"a": layer(quantised=False)}, {"a": view(3, 2, 32, 128, dtype=torch.bfloat16)})


@pytest.mark.parametrize(
    "cache",
    [
        view(3, 2, 32, 96),
        view(3, 4, 32, 100),
        view(3, 2, 24, 100),
        view(3, 6400),
        view(3, 2, 32, 100, dtype=torch.int8),
        view(3, 2, 100, 32).transpose(2, 3),
        view(3, 2, 32, 200)[..., :100],
    ],
)
def test_a_tensor_of_another_layout_stops_start_up(cache):
    with pytest.raises(LayerPagesError, match=r"layer a got a .* uint8 \[blocks, 2, .*16, 100\]"):
        check_views({"a": layer()}, {"a": cache})


def test_a_layer_that_shares_pages_and_has_its_own_tensor_stops_start_up():
    layers = {"a": layer(), "b": layer(target="a")}
    caches = {"a": view(3, 2, 32, 100), "b": view(3, 2, 32, 100)}
    with pytest.raises(LayerPagesError, match=r"layer b got the pages .* layer a, whose pages"):
        check_views(layers, caches)
