# SPDX-License-Identifier: Apache-2.0
"""A plan depends on options of `vllm serve` and on properties of the checkpoint."""

import json
import re
import shutil

import pytest

from testing.shapes import SHAPES

QWEN = SHAPES["qwen3.6-35b-a3b"]
LLAMA = SHAPES["llama-3.1-8b"]
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A function that writes a changed Llama configuration and returns its folder."""

    def write(name, **changes):
        folder = tmp_path_factory.mktemp("models") / name
        folder.mkdir()
        config = json.loads((LLAMA / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    return write


def test_server_options_change_the_plan_or_are_ignored(plan_of):
    options = (LLAMA, "--max-model-len", 4096)
    ignored = ("--port", 8001, "--served-model-name", "larch", "--data-parallel-size", 4)
    assert plan_of(*options, *ignored) == plan_of(*options)
    skipped = plan_of(*options, "--kv-cache-dtype-skip-layers", "7")
    unquantised = [row["layers"] for row in skipped["pages"] if row["stores"] != "k8v4"]
    assert unquantised == [["model.layers.7.self_attn.attn"]]


def test_each_pipeline_stage_has_its_groups(run, plan_of, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    options = (QWEN, "--max-num-seqs", 256, "--pipeline-parallel-size", 2)
    staged = plan_of(*options)
    assert staged["blocks"] * staged["block_bytes"] <= 24 << 30
    places = [(row["stage"], row["group"]) for row in staged["pages"]]
    assert places == [(stage, group) for stage in (0, 1) for group in range(4)]
    layers = [
        (int(name.split(".")[2]), row["stage"]) for row in staged["pages"] for name in row["layers"]
    ]
    assert sorted(layers) == [(layer, layer // 20) for layer in range(40)]
    printed = run(*options, "--memory", "24GiB").stdout.splitlines()
    assert printed[0].endswith("on each GPU of 2")
    rows = [re.split("  +", line)[:4] for line in printed if "state" in line]
    assert rows[:2] == [["0", "0-2", "5", "state (gdn)"], ["1", "0-2", "5", "state (gdn)"]]


@pytest.mark.parametrize(
    ("architecture", "method", "drafts"),
    [
        ("LlamaForCausalLMEagle3", "eagle3", 1),
        ("EagleLlamaForCausalLM", "eagle", 1),
        ("LlamaForCausalLM", "draft_model", 2),
    ],
)
def test_the_layers_of_a_draft_model_are_planned(plan_of, described, architecture, method, drafts):
    draft = described("draft", architectures=[architecture], num_hidden_layers=drafts)
    config = {"method": method, "model": str(draft), "num_speculative_tokens": 3}
    plan, plain = plan_of(LLAMA, "--speculative-config", json.dumps(config)), plan_of(LLAMA)
    assert sum(len(row["layers"]) for row in plan["pages"]) == 32 + drafts
    assert plan["blocks"] < plain["blocks"]
    # With EAGLE vLLM drops the last block of a match, so the first hit needs a block more.
    later = {"draft_model": 0}.get(method, 16)
    assert plan["smallest_hit"] == plain["smallest_hit"] + later


@pytest.mark.parametrize("dtype", ["auto", "turboquant_k8v4"])
def test_decode_context_parallelism_doubles_the_tokens_and_the_match_unit(plan_of, dtype):
    options = (LLAMA, "--tensor-parallel-size", 16, "--kv-cache-dtype", dtype)
    divided, whole = plan_of(*options, "--decode-context-parallel-size", 2), plan_of(*options)
    assert divided["reported_tokens"] == 2 * whole["reported_tokens"]
    assert divided["smallest_hit"] - 1 == 2 * (whole["smallest_hit"] - 1)


def test_a_window_with_decode_context_parallelism_is_refused_by_name(run):
    options = ("--tensor-parallel-size", 32, "--decode-context-parallel-size", 2)
    refused = run(SHAPES["gemma-3-27b"], *options, "--memory", "24GiB")
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert "layers.0.self_attn.attn" in line
    assert "it has a sliding window, which is not supported with decode context" in line


def test_a_config_file_sets_options_and_the_command_line_overrides_it(plan_of, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {LLAMA}\nmax-model-len: 4096\nkv-cache-dtype: fp8\nport: 8001\n")
    plan = plan_of("--config", file)
    assert (plan["kv_cache_dtype"], plan["capacity"]["max_model_len"]) == ("fp8", 4096)
    plan = plan_of("--config", file, "--max-model-len", 512)
    assert plan["capacity"]["max_model_len"] == 512


def test_a_hub_name_is_read_from_the_local_cache(plan_of, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cached = tmp_path / "models--acme--llama"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(LLAMA, cached / "snapshots" / ("a" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    named = ("acme/llama", "--revision", "main")
    assert plan_of(*named) == plan_of(LLAMA)


@pytest.mark.parametrize(
    ("quantisation", "stored"),
    [
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": FP8}, "fp8"),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, "auto"),
        ({"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"}, "fp8_e4m3"),
    ],
)
def test_auto_is_the_cache_dtype_of_a_quantised_checkpoint(
    plan_of, described, quantisation, stored
):
    folder = described("quantised", quantization_config=quantisation)
    plan = plan_of(folder, "--kv-cache-dtype", "auto")
    assert plan["kv_cache_dtype"] == stored
    same = plan_of(LLAMA, "--kv-cache-dtype", "fp8" if "fp8" in stored else "auto")
    assert plan["blocks"] == same["blocks"]
    assert plan_of(folder, "--kv-cache-dtype", "bfloat16")["kv_cache_dtype"] == "bfloat16"
