# SPDX-License-Identifier: Apache-2.0
"""A layer that cannot be served is refused in one message with its name and working advice."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionType

from vllm_hybrid_kv.attention import unsupported
from vllm_hybrid_kv.attention.unsupported import (
    Refusal,
    UnsupportedLayerError,
    refuse_implementation,
    refuse_selection,
)

ODD = Refusal("it is odd", skippable=True)
SKIP = "--kv-cache-dtype-skip-layers"
AUTO = "Serve the model with --kv-cache-dtype auto"


def selection(**changes):
    """Select a backend for a layer as vLLM does. Returns why it is refused, or None."""
    layer = {
        "head_size": 128, "attn_type": AttentionType.DECODER, "use_mla": False, "has_sink": True,
        "use_sparse": False, "use_mm_prefix": False, "use_dcp": False, "use_pcp": False,
    }  # fmt: skip
    return refuse_selection(SimpleNamespace(**{**layer, **changes}))


def implementation(**changes):
    """Construct a layer's implementation. Returns why it is refused, or None."""
    layer = {
        "kv_cache_dtype": "turboquant_k8v4",
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_size": 64,
        "alibi_slopes": None,
        "attn_type": AttentionType.DECODER,
        "extra": {},
    }
    return refuse_implementation(**{**layer, **changes})


def message(reason, prefix="model.layers.7.self_attn.attn"):
    """Refuse a layer while it is constructed, and return the error message."""

    class Layer:
        def __init__(self, prefix):
            raise UnsupportedLayerError(reason)

    with pytest.raises(UnsupportedLayerError) as caught:
        Layer(prefix)
    return str(caught.value)


@pytest.fixture(autouse=True)
def avx512(monkeypatch):
    """Pretend that this machine has AVX-512, which vLLM's fp8 cache needs."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)


@pytest.fixture
def engine(monkeypatch):
    """Return a function that fakes vLLM's config, with layers of the head sizes in `made`."""

    def fake(head_size=128, made=(), types=None, skipped=()):
        layers = {str(i): SimpleNamespace(head_size=size) for i, size in enumerate(made)}
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                get_head_size=lambda: head_size, hf_text_config=SimpleNamespace(layer_types=types)
            ),
            cache_config=SimpleNamespace(kv_cache_dtype_skip_layers=list(skipped)),
            compilation_config=SimpleNamespace(static_forward_context=layers),
        )
        monkeypatch.setattr(unsupported, "get_current_vllm_config_or_none", lambda: config)

    return fake


def test_a_plain_decoder_layer_with_sinks_is_served():
    assert selection() is None
    assert implementation() is None
    assert implementation(extra={"chunk_lookback": -1, "use_alibi_sqrt": False}) is None


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (selection(use_mla=True), "(MLA) has its own latent cache"),
        (selection(use_sparse=True), "do not implement sparse attention"),
        (selection(attn_type=AttentionType.ENCODER_ONLY), "'encoder_only'"),
        (selection(attn_type=AttentionType.ENCODER_DECODER), "'encoder_decoder'"),
        (implementation(attn_type=AttentionType.ENCODER), "'encoder'"),
        (selection(use_mm_prefix=True), "inside multimodal prefixes"),
        (selection(use_rswa=True), "R-SWA"),
    ],
)
def test_a_feature_that_no_skipped_layer_avoids_is_refused_with_auto_as_advice(reason, words):
    found = message(reason)
    assert words in found
    assert found.endswith(f". {AUTO}")


@pytest.mark.parametrize(
    ("field", "kind", "words"),
    [
        ("use_dcp", "decode", "needs Triton, which vLLM disables on this CPU"),
        ("use_pcp", "prefill", "the k8v4 kernels do not implement prefill context parallelism"),
    ],
)
def test_context_parallelism_on_a_cpu_is_refused_with_its_option_as_advice(field, kind, words):
    found = message(selection(**{field: True}))
    assert words in found
    assert found.endswith(f"Serve the model with --{kind}-context-parallel-size 1")


def test_decode_context_parallelism_is_served_where_vllm_has_triton(monkeypatch):
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    assert selection(use_dcp=True) is None


LAYER = "model.layers.7.self_attn.attn"
OR_SERVE = "or serve the model with --kv-cache-dtype auto or fp8"
ON_A_GPU = (
    "Serve the model on a GPU: vLLM's own CPU kernels only take heads of 32, 48, 64, 80, 96, 112, "
    "128, 160, 192, 224, 256, 512"
)


@pytest.mark.parametrize(
    ("head_size", "model", "layer", "advice"),
    [
        # All layers have the refused size.
        (32, {"head_size": 32, "made": [32, 32]}, LAYER, f"{AUTO} or fp8"),
        # vLLM's backend does not list heads of 48, but its CPU kernels serve them without fp8.
        (48, {"head_size": 48}, LAYER, AUTO),
        # vLLM's CPU kernels refuse the size.
        (100, {"head_size": 100}, LAYER, ON_A_GPU),
        (264, {"head_size": 264, "made": [128]}, LAYER, ON_A_GPU),
        # Other layers have a supported size.
        (
            32,
            {"head_size": 32, "made": [128, 32]},
            LAYER,
            f"Either keep it unquantised with {SKIP} 7, {OR_SERVE}",
        ),
        # The advice names all layers of the refused type, and those that are skipped already.
        (
            32,
            {
                "head_size": 256,
                "types": [*["sliding_attention"] * 5, "full_attention"] * 2,
                "skipped": ["0", "1", "10", "11", "swa"],
            },
            "model.layers.5.self_attn.attn",
            f"Either keep the layers of its type unquantised with {SKIP} 0 1 5 10 11 swa, "
            f"{OR_SERVE}",
        ),
        # These names do not have exactly one number, so vLLM cannot skip the layers by number.
        (32, {"made": [128]}, "decoder.attn", f"{AUTO} or fp8"),
        (32, {"made": [128]}, "blocks.3.parts.1.attn", f"{AUTO} or fp8"),
    ],
)
@pytest.mark.parametrize("refuse", [selection, implementation])
def test_a_head_size_is_refused_with_advice_that_works(
    engine, refuse, head_size, model, layer, advice
):
    engine(**model)
    found = message(refuse(head_size=head_size), layer)
    assert found.startswith(f"layer {layer}: ")
    assert "from 64 to 256 in multiples of 8, and 512, " in found
    assert found.endswith(f" got {head_size}. {advice}")


def test_fp8_is_not_advised_without_avx512(monkeypatch, engine):
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    engine(head_size=32)
    assert message(selection(head_size=32)).endswith(AUTO)


def test_the_advice_names_one_layer_if_all_layers_have_the_same_type(engine):
    engine(types=["full_attention"] * 12)
    found = message(implementation(num_heads=9))
    assert f"keep it unquantised with {SKIP} 7, or" in found


@pytest.mark.parametrize(("head_size", "advice"), [(64, f"{AUTO} or fp8"), (80, AUTO)])
def test_alibi_is_refused_for_the_whole_model(engine, head_size, advice):
    engine(head_size=64)
    found = message(implementation(alibi_slopes=[0.5], head_size=head_size))
    assert found.endswith(f"the k8v4 kernels do not implement ALiBi position biases. {advice}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 9}, "9 query heads are not a multiple of 2 KV heads"),
        (
            {"extra": {"chunk_lookback": 3}},
            "it sets chunk_lookback, which the k8v4 kernels do not implement",
        ),
    ],
)
def test_odd_parameters_of_a_layer_are_refused_with_both_kinds_of_advice(changes, words):
    assert message(implementation(**changes)) == (
        "layer model.layers.7.self_attn.attn: --kv-cache-dtype turboquant_k8v4 cannot serve this "
        f"layer: {words}. Either keep it unquantised with {SKIP} 7, or serve the model with "
        "--kv-cache-dtype auto"
    )


def test_the_innermost_layer_is_named_even_if_its_model_has_a_prefix():
    class Layer:
        def __init__(self, **kwargs):
            raise UnsupportedLayerError(ODD)

    class Model:
        def __init__(self, prefix):
            Layer(prefix=f"{prefix}.layers.3.cross_attn.attn")

    with pytest.raises(UnsupportedLayerError, match=r"^layer model\.layers\.3\.cross_attn\.attn: "):
        Model(prefix="model")


@pytest.mark.parametrize("by_name", [True, False])
def test_a_layer_that_is_refused_while_its_cache_is_planned_is_named(by_name):
    class Layer:
        layer_name = "model.layers.3.self_attn.attn"

        def get_kv_cache_spec(self):
            raise UnsupportedLayerError(ODD)

    def get_kv_cache_spec():
        layer_name = Layer.layer_name
        raise UnsupportedLayerError(ODD if layer_name else "")

    with pytest.raises(UnsupportedLayerError, match=r"^layer model\.layers\.3\.self_attn\.attn: "):
        get_kv_cache_spec() if by_name else Layer().get_kv_cache_spec()
