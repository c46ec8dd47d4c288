# SPDX-License-Identifier: Apache-2.0
"""Plans of public models have the layers, blocks and capacity that vLLM itself computes."""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
from transformers import Gemma3TextConfig
from vllm.v1.kv_cache_interface import AttentionSpec

from testing.models import qwen3_next_config
from testing.shapes import SHAPES
from vllm_hybrid_kv.tools.output import ToolError
from vllm_hybrid_kv.tools.plan.engine import Model
from vllm_hybrid_kv.tools.plan.kv_cache_plan import plan_of
from vllm_hybrid_kv.tools.plan.model_description import described
from vllm_hybrid_kv.tools.replay.scheduler import Replay
from vllm_hybrid_kv.tools.replay.trace import TracedRequest

GIB = 1 << 30
K8V4 = "turboquant_k8v4"

# How many layers of each kind a model has, according to its public description.
LAYERS = {
    "qwen3.6-35b-a3b": {"state (gdn)": 30, "full attention": 10},
    "qwen3-next-80b-a3b": {"state (gdn)": 36, "full attention": 12},
    "nemotron-h-8b": {"state (mamba2)": 24, "full attention": 4},
    "gemma-3-27b": {"sliding window 1,024": 52, "full attention": 10},
    "gpt-oss-20b": {"sliding window 128": 12, "full attention": 12},
    "llama-4-scout": {"chunked local 8,192": 36, "full attention": 12},
    "jamba-1.5-mini": {"state (mamba1)": 28, "full attention": 4},
    "llama-3.1-8b": {"full attention": 32},
    # The config.json of these two models does not say which layers are attention layers.
    "falcon-h1-1.5b": {"state (mamba2)": 24, "full attention": 24},
    "zamba2-2.7b": {"state (mamba2)": 54, "full attention": 9},
}


def planned(shape, name, dtype=K8V4, **settings):
    return plan_of(shape(name, dtype), 24 * GIB, settings)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ["auto", "fp8", K8V4])
def test_every_public_model_is_planned_with_every_dtype(shape, name, dtype):
    plan = planned(shape, name, dtype)
    kinds, bytes_of_group = Counter(), Counter()
    for row in plan.pages:
        kinds[row.kind] += len(row.layers)
        bytes_of_group[row.group] += row.page_bytes * len(row.layers)
        assert 0 <= row.padding_bytes < row.page_bytes
    assert kinds == LAYERS[name]
    assert plan.blocks == 24 * GIB // plan.block_bytes
    assert plan.capacity.concurrency >= 1
    assert plan.can_hit
    assert max(bytes_of_group.values()) == plan.block_bytes


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-3-27b", "gpt-oss-20b", "llama-4-scout"])
def test_pages_of_models_without_states_are_equal_and_unpadded_by_default(shape, name):
    plan, auto = planned(shape, name), planned(shape, name, "auto")
    assert {row.stores for row in plan.pages} == {"k8v4"}
    assert {(row.block_tokens, row.padding_bytes) for row in plan.pages} == {(16, 0)}
    assert plan.match_tokens == auto.match_tokens == 16
    assert not plan.warnings
    # Per dim, a key and a value take 4 bytes in bfloat16 and 1.5 bytes in k8v4. Per head, k8v4
    # adds two scales. Both caches leave memory for less than a block unused.
    head_size = 64 if name == "gpt-oss-20b" else 128
    saved = 4 * head_size / (1.5 * head_size + 4)
    assert plan.blocks / auto.blocks == pytest.approx(saved, rel=1 / auto.blocks)


@pytest.mark.parametrize(
    ("name", "unquantised", "warnings"),
    [("llama-3.1-8b", [0, 1, 30, 31], 0), ("llama-4-scout", [0, 1, 46, 47], 1)],
)
def test_boundary_layers_of_models_without_states_are_unquantised(
    shape, name, unquantised, warnings
):
    plan = plan_of(shape(name, K8V4, boundary_layers=2), 24 * GIB, {})
    names = [layer for row in plan.pages if row.stores == "bfloat16" for layer in row.layers]
    assert sorted(int(re.search(r"\d+", layer)[0]) for layer in names) == unquantised
    assert {row.stores for row in plan.pages} == {"k8v4", "bfloat16"}
    # A chunk of Llama 4 consists of whole blocks.
    assert all(8192 % row.block_tokens == 0 for row in plan.pages if "chunked" in row.kind)
    assert len(plan.warnings) == warnings


@pytest.mark.parametrize(
    ("name", "ranks", "heads"),
    [
        ("qwen3.6-35b-a3b", 2, 1),
        # There are more ranks than KV heads, so several ranks have the same head.
        ("qwen3.6-35b-a3b", 8, 1),
        ("llama-3.1-8b", 4, 2),
        # vLLM's CPU kernels would reject experts this narrow; a plan for GPUs must not.
        ("gpt-oss-20b", 4, 2),
        ("jamba-1.5-mini", 2, 4),
        ("nemotron-h-8b", 4, 2),
    ],
)
def test_a_rank_has_its_share_of_heads_and_states(shape, name, ranks, heads):
    whole, part = shape(name, "auto"), shape(name, "auto", ranks)
    assert part.specs.keys() == whole.specs.keys()
    for layer, spec in part.specs.items():
        if isinstance(spec, AttentionSpec):
            assert spec.num_kv_heads == heads
        else:
            assert math.prod(spec.shapes[1]) * ranks == math.prod(whole.specs[layer].shapes[1])


@pytest.mark.parametrize("name", ["qwen3.6-35b-a3b", "gpt-oss-20b", "llama-3.1-8b"])
def test_tokens_in_another_memory_are_those_of_a_new_plan(shape, name):
    model = shape(name, K8V4)
    plan = plan_of(model, 24 * GIB, {})
    for memory in (8 * GIB, 40 * GIB):
        other = plan_of(model, memory, {})
        assert plan.tokens_in(memory) == other.capacity.max_len_tokens
    assert plan.tokens_in(GIB) is None
    with pytest.raises(ValueError, match="larger than the available KV cache memory"):
        plan_of(model, GIB, {})


def test_a_plan_can_hit_if_the_shortest_hit_fits_into_max_model_len(shape):
    with_unit = planned(shape, "nemotron-h-8b", prefix_match_unit="auto")
    without = planned(shape, "nemotron-h-8b", prefix_match_unit="stock")
    assert (with_unit.smallest_hit, without.smallest_hit) == (17, 2721)
    assert with_unit.can_hit
    assert without.can_hit
    short = replace(without, capacity=replace(without.capacity, max_model_len=2721))
    assert not short.can_hit


def test_a_plan_names_its_strategy_and_has_its_padding(shape):
    mixed = shape("gemma-3-27b", K8V4, boundary_layers=2)
    lcm, stock = (plan_of(mixed, 24 * GIB, {"unify_page_sizes": name}) for name in ("lcm", "stock"))
    assert (lcm.unify_page_sizes, stock.unify_page_sizes) == ("lcm", "stock")
    # With `stock`, vLLM pads unquantised layers to a quantised block. With `lcm`, a patch stops it.
    assert lcm.pool_padding < 0.02 < 0.2 < stock.pool_padding < 0.25
    assert lcm.capacity.max_len_tokens > 1.2 * stock.capacity.max_len_tokens
    assert any("% of the KV pool is padding" in line for line in stock.warnings)


@pytest.mark.parametrize(
    ("name", "skipped"), [("jamba-1.5-mini", "4"), ("qwen3-next-80b-a3b", "47")]
)
def test_a_hybrid_model_with_a_skipped_layer_hits_as_with_fp8(name, skipped):
    hits = {}
    arguments = {
        "kv_cache_dtype_skip_layers": [skipped],
        "enable_prefix_caching": True,
        "max_model_len": 32768,
        "max_num_seqs": 256,
    }
    for dtype in ("fp8", K8V4):
        with described(SHAPES[name]) as description:
            model = Model({**arguments, "model": description.folder, "kv_cache_dtype": dtype})
            plan = plan_of(model, 24 * GIB, {})
            hits[dtype] = plan.smallest_hit, hits_of(model.engine(24 * GIB, {}), 4096, 9216)
            # No block is shorter than an unquantised one (80 tokens). All block lengths are
            # multiples of the shortest.
            blocks = sorted({row.block_tokens for row in plan.pages})
            assert blocks[0] >= 80
            assert all(block % blocks[0] == 0 for block in blocks)
    assert hits[K8V4] == hits["fp8"] == (17, [4080, 9200])


def small_gemma3(folder):
    """Write a config like that of Gemma 3 270M: one KV head of 256 dims, windows of 512 tokens."""
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
    """Write the config of the demo's hybrid model."""
    config = qwen3_next_config()
    config.architectures = ["Qwen3NextForCausalLM"]
    config.save_pretrained(folder)
    return folder


BOUNDARY = {"boundary_layers": 2}
SHORT = {"max_model_len": 2048}
SKIP_3 = {"kv_cache_dtype_skip_layers": ["3"]}


@pytest.mark.parametrize(
    ("model", "device", "arguments", "settings", "advice", "better"),
    [
        (small_gemma3, "cpu", {}, BOUNDARY, "set boundary_layers=0", ({}, {})),
        (
            small_gemma3, "cpu", {}, {**BOUNDARY, "unify_page_sizes": "stock"},
            "unify_page_sizes=min_waste", ({}, {**BOUNDARY, "unify_page_sizes": "min_waste"}),
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
    def plan_with(arguments, settings):
        with described(model(tmp_path)) as description:
            common = {"model": description.folder, "kv_cache_dtype": K8V4, "max_num_seqs": 256,
                      "max_model_len": 32768}  # fmt: skip
            built = Model({**common, **arguments}, device, settings)
            return plan_of(built, 8 * GIB, settings)

    before, after = plan_with(arguments, settings), plan_with(*better)
    (line,) = (line for line in before.warnings if "of the KV pool is padding" in line)
    assert advice in line
    assert after.pool_padding < before.pool_padding
    assert after.capacity.max_len_tokens > before.capacity.max_len_tokens


def hits_of(engine, *lengths):
    """Send two equal prompts of each length; return how many tokens the second ones hit."""
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
    with pytest.raises(ToolError) as error:
        replayed.run()
    assert "waiting requests: 1, running requests: 0, free blocks: 0 of " in str(error.value)
    assert "request 1 is first: its 1,024 tokens need 64 blocks" in str(error.value)
    assert "--memory" in str(error.value)
