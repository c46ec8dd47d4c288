# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused in one message that names the layer and the way out."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionType

from vllm_hybrid_kv.attention import unsupported as refusal
from vllm_hybrid_kv.attention.unsupported import (
    UnsupportedLayerError,
    refuse_implementation,
    refuse_selection,
)

SERVABLE = {
    "head_size": 128,
    "attn_type": AttentionType.DECODER,
    "use_mla": False,
    "has_sink": True,
    "use_sparse": False,
    "use_mm_prefix": False,
    "use_per_head_quant_scales": False,
    "use_dcp": False,
    "use_pcp": False,
}
SKIP = "--kv-cache-dtype-skip-layers"
AUTO = "Serve the model with --kv-cache-dtype auto"


def selection(**changes):
    return SimpleNamespace(**{**SERVABLE, **changes})


def implementation(**changes):
    layer = {
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_size": 64,
        "alibi_slopes": None,
        "attn_type": AttentionType.DECODER,
        "extra": {},
    }
    return refuse_implementation(**{**layer, **changes})


def message(reason, prefix="model.layers.7.self_attn.attn"):
    """Return what a layer says that refuses for a reason while it is made."""

    class Layer:
        def __init__(self, prefix):
            raise UnsupportedLayerError(reason)

    with pytest.raises(UnsupportedLayerError) as caught:
        Layer(prefix)
    return str(caught.value)


@pytest.fixture(autouse=True)
def avx512(monkeypatch):
    """An fp8 cache takes AVX-512, which not every machine has that runs these tests."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)


@pytest.fixture
def engine(monkeypatch):
    """Pretend that vLLM is making a model: its configuration, and the layers made so far."""

    def pretend(head_size=128, made=(), types=None, skipped=()):
        layers = {str(i): SimpleNamespace(head_size=size) for i, size in enumerate(made)}
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                get_head_size=lambda: head_size,
                hf_text_config=SimpleNamespace(layer_types=types),
            ),
            cache_config=SimpleNamespace(kv_cache_dtype_skip_layers=list(skipped)),
            compilation_config=SimpleNamespace(static_forward_context=layers),
        )
        monkeypatch.setattr(refusal, "get_current_vllm_config_or_none", lambda: config)

    return pretend


def test_a_plain_decoder_layer_with_sinks_is_served():
    assert refuse_selection(selection()) is None
    assert implementation() is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_mla": True}, "MLA"),
        ({"use_sparse": True}, "sparse"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "'encoder_only'"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "'encoder_decoder'"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"use_per_head_quant_scales": True}, "per-head scales"),
        ({"use_rswa": True}, "R-SWA"),
    ],
)
def test_a_selection_that_no_skipped_layer_would_cure_is_refused_with_auto_as_the_way_out(
    changes, words
):
    reason = refuse_selection(selection(**changes))
    assert words in reason
    said = message(reason)
    assert said.endswith(f". {AUTO}")
    assert words in said
    assert SKIP not in said


@pytest.mark.parametrize(("field", "kind"), [("use_dcp", "decode"), ("use_pcp", "prefill")])
def test_context_parallelism_is_refused_with_its_own_option_as_the_way_out(field, kind):
    said = message(refuse_selection(selection(**{field: True})))
    assert f"{kind} context parallelism. " in said
    assert said.endswith(f"Serve the model with --{kind}-context-parallel-size 1")


@pytest.mark.parametrize("head_size", [32])
@pytest.mark.parametrize("refuse", [selection, implementation])
def test_a_head_size_of_all_layers_is_refused_with_the_dtypes_that_can_be_served(
    engine, head_size, refuse
):
    engine(head_size=head_size, made=[head_size, head_size])
    found = refuse(head_size=head_size)
    said = message(refuse_selection(found) if refuse is selection else found)
    assert f"from 64 to 256 in multiples of 8, and 512, got {head_size}. " in said
    assert said.endswith(f"{AUTO} or fp8")


def test_fp8_is_no_way_out_without_avx512(monkeypatch, engine):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    engine(head_size=32)
    assert message(refuse_selection(selection(head_size=32))).endswith(AUTO)


@pytest.mark.parametrize("head_size", [48, 100, 264])
def test_a_head_size_that_vllm_does_not_list_either_is_refused_with_a_doubt(engine, head_size):
    engine(head_size=head_size)
    said = message(refuse_selection(selection(head_size=head_size)))
    assert f"got {head_size}. " in said
    assert f"{AUTO}, if vLLM's own CPU kernels take heads of {head_size} (they list 32, " in said
    assert "fp8" not in said
    assert SKIP not in said


def test_a_head_size_is_refused_without_the_engine_that_would_say_more():
    assert message(refuse_selection(selection(head_size=32))).endswith(f"{AUTO} or fp8")


def test_an_odd_head_size_among_others_is_refused_with_the_layer_to_skip(engine):
    engine(head_size=32, made=[128, 32])
    said = message(refuse_selection(selection(head_size=32)))
    assert f"Either keep it unquantised with {SKIP} 7, or serve the model with" in said
    assert said.endswith("--kv-cache-dtype auto or fp8")


def test_all_layers_of_the_odd_kind_are_named_and_those_skipped_already(engine):
    types = ["sliding_attention"] * 5 + ["full_attention"]
    engine(head_size=256, types=types * 2, skipped=["0", "1", "10", "11", "swa"])
    said = message(refuse_selection(selection(head_size=32)), "model.layers.5.self_attn.attn")
    assert said.startswith("layer model.layers.5.self_attn.attn: ")
    assert f"keep the layers of its kind unquantised with {SKIP} 0 1 5 10 11 swa, or" in said


def test_types_that_are_all_the_same_do_not_name_every_layer(engine):
    engine(types=["full_attention"] * 12)
    said = message(implementation(num_heads=9))
    assert f"keep it unquantised with {SKIP} 7, or" in said


@pytest.mark.parametrize("prefix", ["decoder.attn", "blocks.3.parts.1.attn"])
def test_a_layer_that_vllm_cannot_skip_is_not_to_be_skipped(engine, prefix):
    engine(made=[128])
    said = message(refuse_selection(selection(head_size=32)), prefix)
    assert said.startswith(f"layer {prefix}: ")
    assert said.endswith(f"{AUTO} or fp8")
    assert SKIP not in said


def test_alibi_is_refused_for_the_whole_model(engine):
    engine(head_size=64)
    said = message(implementation(alibi_slopes=[0.5]))
    assert "ALiBi" in said
    assert said.endswith(f"{AUTO} or fp8")
    said = message(implementation(alibi_slopes=[0.5], head_size=80))
    assert said.endswith(AUTO)


def test_an_encoder_layer_is_refused_for_the_whole_model():
    said = message(implementation(attn_type=AttentionType.ENCODER))
    assert "'encoder'" in said
    assert said.endswith(AUTO)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 9}, "9 query heads are not a multiple of 2 KV heads"),
        ({"extra": {"chunk_lookback": 3}}, "it sets chunk_lookback"),
    ],
)
def test_a_layer_with_odd_parameters_is_refused_with_both_ways_out(changes, words):
    said = message(implementation(**changes))
    assert words in said
    assert said.endswith(
        f"Either keep it unquantised with {SKIP} 7, or serve the model with --kv-cache-dtype auto"
    )


def test_a_parameter_that_is_not_set_does_not_refuse_the_layer():
    assert implementation(extra={"chunk_lookback": -1, "use_alibi_sqrt": False}) is None


def test_the_message_names_the_layer_under_construction_and_how_to_skip_it():
    said = message("it is odd")
    assert said == (
        "layer model.layers.7.self_attn.attn: --kv-cache-dtype turboquant_k8v4 cannot serve this "
        f"layer: it is odd. Either keep it unquantised with {SKIP} 7, or serve the model with "
        "--kv-cache-dtype auto"
    )


def test_the_innermost_layer_is_named_though_its_model_has_a_prefix_as_well():
    class Layer:
        def __init__(self, **kwargs):
            raise UnsupportedLayerError("it is odd")

    class Model:
        def __init__(self, prefix):
            Layer(prefix=f"{prefix}.layers.3.cross_attn.attn")

    with pytest.raises(UnsupportedLayerError, match=r"^layer model\.layers\.3\.cross_attn\.attn: "):
        Model(prefix="model")


@pytest.mark.parametrize("by_name", [True, False])
def test_a_layer_that_is_refused_when_its_cache_is_planned_is_named(by_name):
    class Layer:
        layer_name = "model.layers.3.self_attn.attn"

        def get_kv_cache_spec(self):
            raise UnsupportedLayerError("it is odd")

    def get_kv_cache_spec():
        layer_name = Layer.layer_name
        raise UnsupportedLayerError("it is odd" if layer_name else "")

    with pytest.raises(UnsupportedLayerError, match=r"^layer model\.layers\.3\.self_attn\.attn: "):
        get_kv_cache_spec() if by_name else Layer().get_kv_cache_spec()


def test_the_message_stands_without_a_layer_name():
    with pytest.raises(UnsupportedLayerError, match=r"^an attention layer: .*it is odd") as caught:
        raise UnsupportedLayerError("it is odd")
    assert str(caught.value).endswith(AUTO)
