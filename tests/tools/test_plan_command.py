# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv plan`: what it prints, writes and draws, and what it says to wrong input."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from testing.shapes import SHAPES
from vllm_hybrid_kv.tools.plan.report import ranges

QWEN = SHAPES["qwen3.6-35b-a3b"]
LLAMA = SHAPES["llama-3.1-8b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    # As vLLM for CPUs brings it along: a build for GPUs, which cannot be imported.
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text("raise RuntimeError('no operator nms')\n")
    (folder / "broken.json").write_text("{")
    larch = {**json.loads((LLAMA / "config.json").read_text()), "architectures": ["Larch"]}
    (folder / "larch.json").write_text(json.dumps(larch))
    return folder


@pytest.fixture(scope="module")
def outcome(folder):
    """One run with everything, in a process of its own, as a user runs it."""
    command = Path(sys.executable).with_name("vllm-hybrid-kv")
    return subprocess.run(
        [
            *(command, "plan", QWEN, "--memory", "24GiB", "--compare"),
            *("--json", "plan.json", "--plot", "plan.png"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "COLUMNS": "100", "PYTHONPATH": str(folder)},
    )


def test_a_model_is_planned_without_weights_images_or_a_word_of_vllms(outcome):
    assert (outcome.returncode, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert lines[0] == "Qwen3_5MoeForCausalLM, turboquant_k8v4, 24 GiB of KV cache on a GPU"
    assert lines[1].endswith("is planned as its language model, Qwen3_5MoeForCausalLM")
    (state,) = (line for line in lines if "state (gdn)" in line)
    assert re.split("  +", state) == [
        *("0-2", "10", "state (gdn)", "bfloat16, float32"),
        *("2,768", "2,147,968", "1,664", "0.08"),
    ]


def test_dtypes_and_strategies_stand_side_by_side(outcome):
    dtypes = outcome.stdout.split("Cache dtypes")[1].split()[:3]
    assert dtypes == ["auto", "fp8", "turboquant_k8v4"]
    strategies = outcome.stdout.split("unify_page_sizes with turboquant_k8v4")[1].split()[:3]
    assert strategies == ["lcm", "min_waste", "stock"]


def test_what_is_printed_is_written_as_json(outcome, folder):
    written = json.loads((folder / "plan.json").read_text())
    assert written["architecture"] == "Qwen3_5MoeForCausalLM"
    assert [column["name"] for column in written["dtypes"]] == ["auto", "fp8", "turboquant_k8v4"]
    assert {"lcm", "stock"} <= {column["name"] for column in written["strategies"]}
    plan = written["plan"]
    assert plan == written["dtypes"][2]["plan"]
    assert [row["block_tokens"] for row in plan["pages"]] == [2768] * 4
    assert sum(len(row["layers"]) for row in plan["pages"]) == 40
    assert plan["memory"] == 24 << 30
    assert plan["blocks"] == plan["memory"] // plan["block_bytes"]
    assert plan["smallest_hit"] == 17
    assert plan["can_hit"] is True
    for key in ("short_requests", "max_len_tokens", "max_len_requests"):
        assert f"{int(plan['capacity'][key]):,}" in outcome.stdout


def test_a_block_and_the_capacities_are_drawn(outcome, folder):
    from matplotlib import image

    drawn = image.imread(folder / "plan.png")
    assert drawn.shape[:2] == (750, 1950)
    colours = {tuple(pixel) for pixel in (drawn[..., :3] * 255).astype(int).reshape(-1, 3)}
    states, attention = (0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77)
    auto, fp8, k8v4 = (0x55, 0x55, 0x55), (0xEE, 0x77, 0x33), (0x00, 0x99, 0x88)
    assert {states, attention, auto, fp8, k8v4} <= colours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("broken.json",), "broken.json is not JSON"),
        (("larch.json",), "vLLM has no architecture Larch"),
        ((LLAMA, "--memory", "much"), "--memory: 'much' is not a size"),
        ((LLAMA, "--memory", "1GiB"), "larger than the available KV cache memory"),
        ((LLAMA, "--kv-cache-dtype", "fp3"), "argument --kv-cache-dtype: invalid choice: 'fp3'"),
        ((LLAMA, "--tensor-parallel-size", "3"), "must be divisible by tensor parallel size (3)"),
        ((LLAMA, "--larch", "3"), "unrecognized arguments: --larch 3"),
        ((LLAMA, "--max-num-seqs", "few"), "argument --max-num-seqs: invalid int value"),
        (("no/such-model",), "the local Hugging Face cache has no config.json"),
    ],
)
def test_wrong_input_ends_with_one_line(run, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    if "--memory" not in arguments:
        arguments = (*arguments, "--memory", "24GiB")
    done = run(*arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("vllm-hybrid-kv plan: ")
    assert message in line


def test_what_a_server_would_refuse_is_said_beside_what_it_would_not(run, tmp_path):
    config = json.loads((SHAPES["llama-3.1-8b"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 32}))
    asked = (tmp_path, "--memory", "24GiB", "--max-model-len", 131072)
    refused = run(*asked)
    assert refused.exit_code == 2
    assert "layer model.layers.2.self_attn.attn: --kv-cache-dtype" in refused.stderr
    assert "64 to 256 in multiples of 8, and 512, got 32. Serve the model with" in refused.stderr
    done = run(*asked, "--kv-cache-dtype", "auto", "--json", "-")
    assert done.exit_code == 0, done.stderr
    *_, k8v4 = json.loads(done.stdout)["dtypes"]
    assert k8v4["plan"] is None
    assert k8v4["reason"] in refused.stderr


def test_a_layer_whose_pages_have_another_layout_is_refused_as_a_server_does(run, monkeypatch):
    from vllm.v1.engine import core

    from vllm_hybrid_kv.attention.layer_check import INSTEAD

    original = core.get_kv_cache_configs

    def with_wider_heads(*arguments):
        plans = original(*arguments)
        for group in plans[-1].kv_cache_groups:
            group.kv_cache_spec = replace(group.kv_cache_spec, head_size=256)
        return plans

    asked = (LLAMA, "--memory", "24GiB", "--boundary-layers", 0, "--pipeline-parallel-size", 2)
    assert run(*asked).exit_code == 0
    # In the last stage.
    monkeypatch.setattr(core, "get_kv_cache_configs", with_wider_heads)
    refused = run(*asked)
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(
        "vllm-hybrid-kv plan: layer model.layers.16.self_attn.attn cannot use the pages of KV "
    )
    assert "its head size is 128, theirs is 256" in line
    assert line.endswith(INSTEAD)
    # Only layers with k8v4 pages are checked, as on a server.
    assert run(*asked, "--kv-cache-dtype", "auto").exit_code == 0


def test_a_dtype_that_does_not_fit_is_said_beside_one_that_does(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = run(LLAMA, "--memory", "10GiB")
    assert done.exit_code == 0, done.stderr
    assert "auto: To serve at least one request" in done.stdout
    (blocks,) = (line for line in done.stdout.splitlines() if line.startswith("blocks"))
    _, auto, fp8, k8v4 = blocks.split()
    assert auto == "-"
    assert int(fp8.replace(",", "")) < int(k8v4.replace(",", ""))


def test_the_command_line_wins_over_the_environment(run, monkeypatch):
    monkeypatch.setenv("VLLM_HYBRID_KV_UNIFY_PAGE_SIZES", "stock")
    asked = (SHAPES["gemma-3-27b"], "--memory", "24GiB", "--json", "-")
    for more, strategy in ((("--unify", "lcm"), "lcm"), ((), "stock")):
        monkeypatch.setenv("VLLM_HYBRID_KV_UNIFY_PAGE_SIZES", "stock")
        done = run(*asked, *more)
        assert json.loads(done.stdout)["plan"]["unify_page_sizes"] == strategy


@pytest.mark.parametrize(("number", "unquantised"), [(0, []), (1, [0, 31])])
def test_the_layers_left_unquantised_are_those_asked_for(run, monkeypatch, number, unquantised):
    monkeypatch.setenv("VLLM_HYBRID_KV_BOUNDARY_LAYERS", "3")
    done = run(LLAMA, "--memory", "24GiB", "--boundary-layers", number, "--json", "-")
    pages = json.loads(done.stdout)["plan"]["pages"]
    layers = [name for row in pages if row["stores"] != "k8v4" for name in row["layers"]]
    assert sorted(int(name.split(".")[2]) for name in layers) == unquantised


@pytest.mark.parametrize(
    ("model", "memory", "blocks"),
    [
        (QWEN, "20GiB", 999),
        (QWEN, "12GiB", 599),
        (SHAPES["nemotron-h-8b"], "12GiB", 755),
    ],
)
def test_more_requests_than_state_blocks_are_refused_with_a_number_that_is_planned(
    run, model, memory, blocks
):
    refused = run(model, "--memory", memory)
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert f"max_num_seqs (1024) exceeds available Mamba cache blocks ({blocks}):" in line
    advice = re.search(r"Pass (--max-num-seqs) (\d+)", line)
    done = run(model, "--memory", memory, *advice.groups(), "--json", "-")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["blocks"] == blocks == int(advice[2])


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0, 2-3, 7"), ([], "")],
)
def test_runs_of_groups_are_drawn_together(numbers, text):
    assert ranges(numbers) == text
