# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused in one message that names the layer and the way out."""

from types import SimpleNamespace

import pytest
from vllm.v1.attention.backend import AttentionType

from vllm_hybrid_kv.attention.refusal import (
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


def test_a_plain_decoder_layer_with_sinks_is_served():
    assert refuse_selection(selection()) is None
    assert implementation() is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_mla": True}, "MLA"),
        ({"use_sparse": True}, "sparse"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "encoder_decoder"),
        ({"use_mm_prefix": True}, "multimodal"),
        ({"use_dcp": True}, "decode context parallelism"),
        ({"use_pcp": True}, "prefill context parallelism"),
        ({"use_rswa": True}, "R-SWA"),
        ({"head_size": 48}, "from 64 to 256 in multiples of 8, got 48"),
        ({"head_size": 264}, "got 264"),
        ({"head_size": 100}, "got 100"),
    ],
)
def test_a_selection_that_cannot_be_served_is_refused_with_the_reason(changes, words):
    assert words in refuse_selection(selection(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi"),
        ({"attn_type": AttentionType.ENCODER}, "encoder"),
        ({"num_heads": 9}, "9 query heads are not a multiple of 2 KV heads"),
        ({"extra": {"chunk_lookback": 3}}, "chunk_lookback"),
        ({"head_size": 512}, "got 512"),
    ],
)
def test_a_layer_whose_parameters_cannot_be_served_is_refused_with_the_reason(changes, words):
    assert words in implementation(**changes)


def test_a_parameter_that_is_not_set_does_not_refuse_the_layer():
    assert implementation(extra={"chunk_lookback": -1, "use_alibi_sqrt": False}) is None


def test_the_message_names_the_layer_under_construction_and_how_to_skip_it():
    class Layer:
        def __init__(self, prefix):
            raise UnsupportedLayerError("it is odd")

    with pytest.raises(UnsupportedLayerError) as caught:
        Layer("model.layers.7.self_attn.attn")
    message = str(caught.value)
    assert "layer model.layers.7.self_attn.attn" in message
    assert "it is odd" in message
    assert "--kv-cache-dtype-skip-layers 7" in message
    assert "--kv-cache-dtype auto" in message


def test_the_message_stands_without_a_layer_name():
    with pytest.raises(UnsupportedLayerError, match=r"^an attention layer: .*it is odd"):
        raise UnsupportedLayerError("it is odd")
