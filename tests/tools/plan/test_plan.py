# SPDX-License-Identifier: Apache-2.0
"""Plans of public models have vLLM's own numbers."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3TextConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

from testing.models import qwen3_next_config
from testing.shapes import SHAPES
from vllm_hybrid_kv.attention.unsupported import UnsupportedModelError
from vllm_hybrid_kv.kernels.k8v4 import slot_bytes
from vllm_hybrid_kv.tools.plan.engine import Model
from vllm_hybrid_kv.tools.plan.kv_cache_plan import Pages, merge_equal, plan_of
from vllm_hybrid_kv.tools.plan.model_description import described
from vllm_hybrid_kv.tools.replay.scheduler import Replay, StuckError
from vllm_hybrid_kv.tools.replay.trace import TracedRequest

GIB = 1 << 30
K8V4 = "turboquant_k8v4"

# Layers by kind, from each model's public description.
LAYERS = {
    "qwen3.6-35b-a3b": {"state (gdn)": 30, "full attention": 10},
    "qwen3-next-80b-a3b": {"state (gdn)": 36, "full attention": 12},
    "nemotron-h-8b": {"state (mamba2)": 24, "full attention": 4},
    "gemma-3-27b": {"sliding window 1,024": 52, "full attention": 10},
    "gpt-oss-20b": {"sliding window 128": 12, "full attention": 12},
    "llama-4-scout": {"chunked local 8,192": 36, "full attention": 12},
    "jamba-1.5-mini": {"state (mamba1)": 28, "full attention": 4},
    "llama-3.1-8b": {"full attention": 32},
    # Their configurations do not say which layers are attention.
    "falcon-h1-1.5b": {"state (mamba2)": 24, "full attention": 24},
    "zamba2-2.7b": {"state (mamba2)": 54, "full attention": 9},
}


def kinds(pages):
    counted = Counter()
    for row in pages:
        counted[row.kind] += len(row.layers)
    return counted


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ["auto", "fp8", K8V4])
def test_every_public_model_is_planned_with_every_dtype(shape, name, dtype):
    plan = plan_of(shape(name, dtype), 24 * GIB, {}).plan
    assert kinds(plan.pages) == LAYERS[name]
    assert plan.blocks == 24 * GIB // plan.block_bytes
    assert plan.capacity.concurrency >= 1
    assert plan.can_hit
    by_group = Counter()
    for row in plan.pages:
        by_group[row.group] += row.page_bytes * len(row.layers)
        assert 0 <= row.padding_bytes < row.page_bytes
    assert max(by_group.values()) == plan.block_bytes


def test_llama_4_has_whole_blocks_in_each_chunk_and_unquantised_boundary_layers(shape):
    plan = plan_of(shape("llama-4-scout", K8V4), 24 * GIB, {}).plan
    stored = {layer: row for row in plan.pages for layer in row.layers}
    unquantised = [name for name in stored if stored[name].stores == "bfloat16"]
    indices = sorted(
        int(part) for name in unquantised for part in name.split(".") if part.isdigit()
    )
    assert indices == [0, 1, 46, 47]
    chunked = [row for row in plan.pages if row.kind == "chunked local 8,192"]
    assert {row.stores for row in chunked} == {"k8v4", "bfloat16"}
    for row in chunked:
        assert 8192 % row.block_tokens == 0


def test_a_model_with_latent_attention_is_refused_before_its_layers_are_built(tmp_path):
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "q_lora_rank": None,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"model .*: .* latent attention \(MLA\) "):
        Model({"model": str(tmp_path), "kv_cache_dtype": K8V4})


def test_qwen3_6_has_the_blocks_of_a_server(shape):
    model = shape("qwen3.6-35b-a3b", K8V4)
    plan = plan_of(model, 24 * GIB, {}).plan
    state, attention = (rows for rows, _ in merge_equal(plan.pages))
    assert (state.block_tokens, attention.block_tokens) == (2768, 2768)
    assert round(100 * state.padding, 2) == 0.08
    assert state.stores == "bfloat16, float32"
    assert (attention.stores, attention.padding_bytes) == ("k8v4", 0)
    assert attention.page_bytes == 2768 * 2 * slot_bytes(256) == 2768 * 2 * 388
    assert state.page_bytes == attention.page_bytes


def test_dense_models_keep_their_boundary_layers_unquantised(shape):
    plan = plan_of(shape("llama-3.1-8b", K8V4), 24 * GIB, {}).plan
    stored = {layer: row.stores for row in plan.pages for layer in row.layers}
    unquantised = [int(name.split(".")[2]) for name in stored if stored[name] == "bfloat16"]
    assert sorted(unquantised) == [0, 1, 30, 31]
    assert set(stored.values()) == {"k8v4", "bfloat16"}
    assert {row.group for row in plan.pages} == {0}
    assert not plan.warnings


@pytest.mark.parametrize(
    ("name", "ranks", "heads"),
    [
        ("qwen3.6-35b-a3b", 2, 1),
        # More ranks than KV heads, so several ranks have the same head.
        ("qwen3.6-35b-a3b", 8, 1),
        ("llama-3.1-8b", 4, 2),
        # vLLM's CPU kernels reject such narrow experts.
        ("gpt-oss-20b", 4, 2),
        ("jamba-1.5-mini", 2, 4),
        ("nemotron-h-8b", 4, 2),
    ],
)
def test_a_rank_has_its_share_of_heads_and_states(shape, name, ranks, heads):
    whole, part = shape(name, "auto"), shape(name, "auto", ranks)
    engine = part.engine(24 * GIB, {})
    config = engine.vllm_config
    assert config.model_config.get_num_kv_heads(config.parallel_config) == heads
    assert part.specs.keys() == whole.specs.keys()
    for layer, spec in part.specs.items():
        if isinstance(spec, AttentionSpec):
            assert spec.num_kv_heads == heads
        else:
            assert isinstance(spec, MambaSpec)
            assert math.prod(spec.shapes[1]) * ranks == math.prod(whole.specs[layer].shapes[1])
    # All ranks have the same groups.
    (_, *others) = kv_cache_utils.get_kv_cache_configs(
        config, [dict(part.specs) for _ in range(ranks)], [24 * GIB] * ranks
    )
    for plan in others:
        assert plan.num_blocks == engine.kv_cache_config.num_blocks


def test_tokens_in_another_memory_are_those_of_a_new_plan(shape):
    model = shape("qwen3.6-35b-a3b", K8V4)
    planned = plan_of(model, 24 * GIB, {})
    for memory in (8 * GIB, 40 * GIB):
        other = plan_of(model, memory, {}).plan
        assert planned.tokens_in(memory) == other.capacity.max_len_tokens
    assert planned.tokens_in(GIB) is None
    with pytest.raises(ValueError, match="larger than the available KV cache memory"):
        plan_of(model, GIB, {})


def test_a_plan_can_hit_if_the_shortest_hit_fits_into_max_model_len(shape):
    model = shape("nemotron-h-8b", K8V4)
    with_unit = plan_of(model, 24 * GIB, {"prefix_match_unit": "auto"}).plan
    without = plan_of(model, 24 * GIB, {"prefix_match_unit": "stock"}).plan
    assert (with_unit.smallest_hit, without.smallest_hit) == (17, 2721)
    assert with_unit.can_hit
    assert without.can_hit
    short = replace(without, capacity=replace(without.capacity, max_model_len=2721))
    assert not short.can_hit


def test_a_plan_names_its_strategy_and_has_its_padding(shape):
    model = shape("gemma-3-27b", K8V4)
    lcm, stock = (
        plan_of(model, 24 * GIB, {"unify_page_sizes": name}).plan for name in ("lcm", "stock")
    )
    assert (lcm.unify_page_sizes, stock.unify_page_sizes) == ("lcm", "stock")
    # Before planning vLLM aligns blocks for its own strategy only.
    assert lcm.pool_padding < 0.02 < 0.2 < stock.pool_padding < 0.25
    assert lcm.capacity.max_len_tokens > 1.2 * stock.capacity.max_len_tokens
    assert any("% of the KV pool is padding" in line for line in stock.warnings)


@pytest.mark.parametrize(
    ("name", "skipped"), [("jamba-1.5-mini", "4"), ("qwen3-next-80b-a3b", "47")]
)
def test_a_hybrid_model_with_a_skipped_layer_hits_as_with_fp8(name, skipped):
    hits = {}
    for dtype in ("fp8", K8V4):
        with described(SHAPES[name]) as description:
            model = Model(
                {
                    "model": description.folder,
                    "kv_cache_dtype": dtype,
                    "kv_cache_dtype_skip_layers": [skipped],
                    "enable_prefix_caching": True,
                    "max_model_len": 32768,
                    "max_num_seqs": 256,
                }
            )
            plan = plan_of(model, 24 * GIB, {}).plan
            hits[dtype] = plan.smallest_hit, hits_of(model.engine(24 * GIB, {}), 4096, 9216)
            # Blocks are at least those of an unquantised cache, and multiples of the smallest.
            blocks = sorted({row.block_tokens for row in plan.pages})
            assert blocks[0] >= 80
            assert all(block % blocks[0] == 0 for block in blocks)
    assert hits[K8V4] == hits["fp8"] == (17, [4080, 9200])


def small_gemma3(folder):
    """The shape of Gemma 3 270M: one KV head of 256 dims, windows of 512 tokens."""
    config = Gemma3TextConfig(
        vocab_size=512, hidden_size=640, intermediate_size=256, num_hidden_layers=18,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, sliding_window=512,
        architectures=["Gemma3ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    return folder


def qwen3_6(folder):
    return SHAPES["qwen3.6-35b-a3b"]


def small_qwen3_next(folder):
    """The demo's hybrid model."""
    config = qwen3_next_config()
    config.architectures = ["Qwen3NextForCausalLM"]
    config.save_pretrained(folder)
    return folder


SHORT = {"max_model_len": 2048}
SKIP_3 = {"kv_cache_dtype_skip_layers": ["3"]}


@pytest.mark.parametrize(
    ("model", "device", "arguments", "settings", "advice", "better"),
    [
        (small_gemma3, "cpu", {}, {}, "set boundary_layers=0", ({}, {"boundary_layers": 0})),
        (
            small_gemma3, "cpu", {}, {"unify_page_sizes": "stock"}, "unify_page_sizes=min_waste",
            ({}, {"unify_page_sizes": "min_waste"}),
        ),
        (qwen3_6, "gpu", SKIP_3, {}, "remove --kv-cache-dtype-skip-layers", ({}, {})),
        (
            small_qwen3_next, "cpu", SHORT, {}, "pass --block-size 32",
            ({**SHORT, "block_size": 32}, {}),
        ),
    ],
    ids=["boundary layers", "another strategy", "skipped layers", "block size"],
)  # fmt: skip
def test_the_advice_of_the_padding_warning_reduces_the_padding(
    tmp_path, model, device, arguments, settings, advice, better
):
    def planned(arguments, settings):
        with described(model(tmp_path)) as description:
            common = {"model": description.folder, "kv_cache_dtype": K8V4, "max_num_seqs": 256,
                      "max_model_len": 32768}  # fmt: skip
            built = Model({**common, **arguments}, device, settings)
            return plan_of(built, 8 * GIB, settings).plan

    before, after = planned(arguments, settings), planned(*better)
    (line,) = (line for line in before.warnings if "of the KV pool is padding" in line)
    assert advice in line
    assert after.pool_padding < before.pool_padding
    assert after.capacity.max_len_tokens > before.capacity.max_len_tokens


def hits_of(engine, *lengths):
    """Return the tokens that the second of two equal prompts of each length gets from the cache."""
    requests = [
        TracedRequest(0.0, length, 4, tuple(range(1000 * length, 1000 * length + length // 512)))
        for length in lengths
        for _ in range(2)
    ]
    return Replay(engine, requests, concurrency=1).run().hits[1::2]


def test_a_replay_that_schedules_nothing_stops_with_the_schedulers_state(shape):
    engine = shape("llama-3.1-8b", K8V4).engine(24 * GIB, {})
    replayed = Replay(engine, [TracedRequest(0.0, 1024, 4, (1, 2))], concurrency=1)
    pool = engine.scheduler.kv_cache_manager.block_pool
    pool.get_new_blocks(pool.get_num_free_blocks())
    with pytest.raises(StuckError) as error:
        replayed.run()
    assert "1 requests wait and 0 run, 0 of " in str(error.value)
    assert "request 1 is first: its 1,024 tokens need 64 blocks" in str(error.value)
    assert "--memory" in str(error.value)


rows = st.builds(
    Pages,
    group=st.integers(0, 5),
    layers=st.lists(st.sampled_from("abc"), max_size=3).map(tuple),
    kind=st.sampled_from(["full attention", "state"]),
    stores=st.just("k8v4"),
    block_tokens=st.sampled_from([16, 32]),
    page_bytes=st.just(100),
    padding_bytes=st.sampled_from([0, 10]),
)


@given(st.lists(rows, max_size=12))
def test_merging_equal_pages_keeps_every_group_once(pages):
    merged = merge_equal(pages)
    assert sum(len(groups) for _, groups in merged) == len(pages)
    keys = [_key(row) for row, _ in merged]
    assert len(set(keys)) == len(keys)
    for row, groups in merged:
        assert groups == [p.group for p in pages if _key(p) == _key(row)]


def _key(row):
    return len(row.layers), row.kind, row.stores, row.block_tokens, row.padding_bytes, row.stage
