# SPDX-License-Identifier: Apache-2.0
"""Check the tables, JSON, picture and errors of `vllm-hybrid-kv plan`."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import image

from testing import processes
from testing.shapes import SHAPES
from tests.conformance.releases import environment_of, unpacked_wheel
from vllm_hybrid_kv.tools.plan.report import ranges

QWEN = SHAPES["qwen3.6-35b-a3b"]
LLAMA = SHAPES["llama-3.1-8b"]


# The wheel of 0.33 is not built for CPUs and would find no device, so set its platform.
WITH_0_33 = """
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform
vllm.platforms.current_platform = CpuPlatform()
from vllm_hybrid_kv.tools.main import app
app()
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Run `plan` once with all its outputs; return the folder and the finished process."""
    folder = tmp_path_factory.mktemp("plan")
    # A CPU installation of vLLM may have a torchvision for GPUs, which cannot be imported.
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text("raise RuntimeError('no operator nms')\n")
    command = [
        *(Path(sys.executable).with_name("vllm-hybrid-kv"), "plan", QWEN, "--memory", "24GiB"),
        *("--compare", "--json", "plan.json", "--plot", "plan.png"),
    ]
    return folder, processes.run(command, cwd=folder, COLUMNS="100", PYTHONPATH=str(folder))


def test_a_plan_prints_its_tables_and_no_message_of_vllm(outcome):
    _, done = outcome
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "Qwen3_5MoeForCausalLM, turboquant_k8v4, 24 GiB of KV cache on a GPU"
    assert lines[1].endswith("is planned as its language model, Qwen3_5MoeForCausalLM")
    (state,) = (line for line in lines if "state (gdn)" in line)
    assert re.split("  +", state) == [
        *("0-2", "10", "state (gdn)", "bfloat16, float32"),
        *("2,768", "2,147,968", "1,664", "0.08"),
    ]
    dtypes, strategies = re.split("Cache dtypes|unify_page_sizes with.*", done.stdout)[1:]
    assert dtypes.split()[:3] == ["auto", "fp8", "turboquant_k8v4"]
    assert strategies.split()[:3] == ["lcm", "min_waste", "stock"]


def test_a_model_is_planned_with_vllm_0_33():
    arguments = ("plan", LLAMA, "--memory", "32GiB", "--device", "cpu")
    done = processes.run(
        [sys.executable, "-c", WITH_0_33, *arguments],
        COLUMNS="100",
        **environment_of("0.33", unpacked_wheel("0.33")),
    )
    assert done.returncode == 0, done.stderr
    assert "full attention" in done.stdout
    assert "tokens that vLLM reports" in done.stdout


def test_json_has_the_printed_numbers_and_a_schema_version(outcome):
    folder, done = outcome
    written = json.loads((folder / "plan.json").read_text())
    assert written["architecture"] == "Qwen3_5MoeForCausalLM"
    assert written["schema"] == 1
    assert [column["name"] for column in written["dtypes"]] == ["auto", "fp8", "turboquant_k8v4"]
    assert {"lcm", "stock"} <= {column["name"] for column in written["strategies"]}
    plan = written["plan"]
    assert plan == written["dtypes"][2]["plan"]
    assert [row["block_tokens"] for row in plan["pages"]] == [2768] * 4
    assert (plan["smallest_hit"], plan["can_hit"]) == (17, True)
    for key in ("short_requests", "max_len_tokens", "max_len_requests"):
        assert f"{int(plan['capacity'][key]):,}" in done.stdout


def test_a_block_and_the_capacities_are_drawn(outcome):
    drawn = image.imread(outcome[0] / "plan.png")
    assert drawn.shape[:2] == (750, 1950)
    colours = {tuple(pixel) for pixel in (drawn[..., :3] * 255).astype(int).reshape(-1, 3)}
    states, attention = (0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77)
    auto, fp8, k8v4 = (0x55, 0x55, 0x55), (0xEE, 0x77, 0x33), (0x00, 0x99, 0x88)
    assert {states, attention, auto, fp8, k8v4} <= colours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LLAMA, "--memory", "1GiB"), "Increase --memory or decrease --max-model-len."),
        ((LLAMA, "--kv-cache-dtype", "fp3"), "argument --kv-cache-dtype: invalid choice: 'fp3'"),
        ((LLAMA, "--tensor-parallel-size", "3"), "must be divisible by tensor parallel size (3)"),
        ((LLAMA, "--larch", "3"), "unrecognized arguments: --larch 3"),
        ((LLAMA, "--max-model-length", "3"), "did you mean '--max-model-len'?"),
        ((LLAMA, "--boundary-layer", "3"), "did you mean '--boundary-layers'?"),
        ((LLAMA, "--max-num-seqs", "few"), "argument --max-num-seqs: invalid int value"),
        (("--config", "missing.yaml"), "No such file or directory: 'missing.yaml'"),
    ],
)
def test_wrong_input_is_reported_in_one_line(run, arguments, message):
    done = run("--memory", "24GiB", *arguments)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("vllm-hybrid-kv plan: ")
    assert message in line


def test_a_dtype_that_a_server_refuses_has_the_reason_instead_of_a_plan(run, tmp_path):
    config = json.loads((LLAMA / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "head_dim": 32}))
    options = (tmp_path, "--memory", "24GiB", "--max-model-len", 131072)
    refused = run(*options)
    assert refused.exit_code == 2
    assert "layer model.layers.0.self_attn.attn: --kv-cache-dtype" in refused.stderr
    assert "64 to 256 in multiples of 8, and 512, got 32. Serve the model with" in refused.stderr
    done = run(*options, "--kv-cache-dtype", "auto", "--json", tmp_path / "plan.json")
    assert done.exit_code == 0, done.stderr
    *_, k8v4 = json.loads((tmp_path / "plan.json").read_text())["dtypes"]
    assert k8v4["plan"] is None
    assert k8v4["reason"] in refused.stderr
    assert f"turboquant_k8v4: {k8v4['reason']}" in " ".join(done.stdout.split())
    (blocks,) = (line for line in done.stdout.splitlines() if line.startswith("blocks"))
    assert blocks.split()[-1] == "-"


def test_a_layer_that_cannot_use_its_pages_is_refused_as_by_a_server(run, monkeypatch):
    from vllm.v1.engine import core

    from vllm_hybrid_kv.attention.layer_check import ADVICE
    from vllm_hybrid_kv.tools.options import in_tool_options

    original = core.get_kv_cache_configs

    def with_wider_heads(*arguments):
        plans = original(*arguments)
        for group in plans[-1].kv_cache_groups:
            group.kv_cache_spec = replace(group.kv_cache_spec, head_size=256)
        return plans

    options = (LLAMA, "--memory", "24GiB", "--pipeline-parallel-size", 2)
    assert run(*options).exit_code == 0
    # Give the layers of the last pipeline stage pages that do not match them.
    monkeypatch.setattr(core, "get_kv_cache_configs", with_wider_heads)
    refused = run(*options)
    assert refused.exit_code == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(
        "vllm-hybrid-kv plan: layer model.layers.16.self_attn.attn cannot use the pages of KV "
    )
    assert "its head size is 128, that of the pages is 256" in line
    assert line.endswith(in_tool_options(ADVICE))
    # Like a server, the command checks only layers with k8v4 pages.
    assert run(*options, "--kv-cache-dtype", "auto").exit_code == 0


@pytest.mark.parametrize(("more", "strategy"), [(("--unify", "lcm"), "lcm"), ((), "stock")])
def test_the_command_line_overrides_the_environment(plan_of, monkeypatch, more, strategy):
    monkeypatch.setenv("VLLM_HYBRID_KV_UNIFY_PAGE_SIZES", "stock")
    assert plan_of(SHAPES["gemma-3-27b"], *more)["unify_page_sizes"] == strategy


@pytest.mark.parametrize(("number", "unquantised"), [(0, []), (1, [0, 31])])
def test_boundary_layers_sets_the_unquantised_layers(plan_of, monkeypatch, number, unquantised):
    monkeypatch.setenv("VLLM_HYBRID_KV_BOUNDARY_LAYERS", "3")
    pages = plan_of(LLAMA, "--boundary-layers", number)["pages"]
    layers = [name for row in pages if row["stores"] != "k8v4" for name in row["layers"]]
    assert sorted(int(name.split(".")[2]) for name in layers) == unquantised


@pytest.mark.parametrize(
    ("model", "memory", "blocks"), [(QWEN, "20GiB", 999), (SHAPES["nemotron-h-8b"], "12GiB", 755)]
)
def test_more_sequences_than_state_blocks_are_refused_with_a_number_that_works(
    run, plan_of, model, memory, blocks
):
    refused = run(model, "--memory", memory)
    assert refused.exit_code == 2
    assert f"max_num_seqs (1024) exceeds available Mamba cache blocks ({blocks}):" in refused.stderr
    advice = re.search(r"Pass (--max-num-seqs) (\d+)", refused.stderr)
    assert int(advice[2]) == blocks
    assert plan_of(model, "--memory", memory, *advice.groups())["blocks"] == blocks


def test_group_numbers_are_printed_as_ranges():
    assert ranges([0, 2, 3, 7]) == "0, 2-3, 7"
