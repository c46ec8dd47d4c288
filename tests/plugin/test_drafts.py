# SPDX-License-Identifier: Apache-2.0
"""Engines whose draft tokens can corrupt cached states are refused before vLLM loads the model."""

from __future__ import annotations

import pytest
from transformers import FalconH1Config
from vllm.engine.arg_utils import EngineArgs

from testing.models import gemma3_config, large_state_config, with_mtp_layer
from vllm_hybrid_kv import plugin
from vllm_hybrid_kv.errors import HybridKVError

MTP = {"method": "mtp", "num_speculative_tokens": 2}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
STOCK = dict.fromkeys(
    ("unify_page_sizes", "token_capacity_groups", "coordinator", "prefix_match_unit"), "stock"
)
MESSAGE = "can corrupt them"


def gated_delta_net():
    return with_mtp_layer(large_state_config())


def mamba2():
    config = FalconH1Config(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, mamba_d_ssm=64,
        mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16,
    )  # fmt: skip
    config.architectures = ["FalconH1ForCausalLM"]
    config.dtype = "bfloat16"
    return config


def windows():
    config = gemma3_config()
    config.architectures = ["Gemma3ForCausalLM"]
    config.dtype = "bfloat16"
    return config


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that configures an engine as `vllm serve` does, without loading a model."""
    plugin.register()

    def make(config, speculative_config=None, settings=None, **arguments):
        config.save_pretrained(tmp_path)
        return EngineArgs(
            model=str(tmp_path),
            skip_tokenizer_init=True,
            max_model_len=256,
            enable_prefix_caching=arguments.pop("enable_prefix_caching", True),
            speculative_config=speculative_config,
            additional_config={"hybrid_kv": settings or {}},
            **arguments,
        ).create_engine_config()

    return make


@pytest.mark.parametrize(("config", "drafts"), [(gated_delta_net, MTP), (mamba2, NGRAM)])
def test_drafts_that_can_corrupt_cached_states_are_refused(start, config, drafts):
    with pytest.raises(HybridKVError) as error:
        start(config(), drafts)
    message = str(error.value)
    assert MESSAGE in message
    for part in (
        config().architectures[0],
        repr(drafts["method"]),
        "about 20 % lower accuracy",
        "--no-enable-prefix-caching",
        "--speculative-config",
        "allow_unsafe_drafts=true",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("config", "drafts", "settings", "arguments"),
    [
        pytest.param(gated_delta_net, MTP, {}, {"enable_prefix_caching": False}, id="no cache"),
        pytest.param(gated_delta_net, None, {}, {}, id="no drafts"),
        pytest.param(gated_delta_net, NGRAM, {}, {}, id="text drafts, states not exported"),
        pytest.param(windows, NGRAM, {}, {}, id="no states"),
        pytest.param(gated_delta_net, MTP, STOCK, {}, id="vLLM's own rules and cache"),
        pytest.param(mamba2, NGRAM, {"allow_unsafe_drafts": True}, {}, id="risk accepted"),
    ],
)
def test_other_engines_with_drafts_or_cached_states_start(
    start, config, drafts, settings, arguments
):
    made = start(config(), drafts, settings, **arguments)
    assert (made.speculative_config is None) == (drafts is None)


def test_stock_rules_with_our_cache_are_refused(start):
    with pytest.raises(HybridKVError, match=MESSAGE):
        start(gated_delta_net(), MTP, STOCK, kv_cache_dtype="turboquant_k8v4")
