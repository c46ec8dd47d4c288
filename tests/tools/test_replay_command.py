# SPDX-License-Identifier: Apache-2.0
"""Check the outputs and errors of `vllm-hybrid-kv replay`, and how memory sizes are read."""

import json
import sys
from pathlib import Path

import pytest
from matplotlib import image

from testing import processes
from testing.models import large_state_config
from vllm_hybrid_kv.tools.options import memory_size
from vllm_hybrid_kv.tools.output import ToolError, format_size
from vllm_hybrid_kv.tools.replay.trace import TracedRequest, write_trace


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 << 30),
        ("20 gib", 20 << 30),
        ("1.5G", 3 << 29),
        ("2GB", 2 * 10**9),
        ("4096", 4096),
        ("1T", 1 << 40),
    ],
)
def test_a_size_is_read_with_its_unit(text, size):
    assert memory_size(text) == size


def test_a_size_is_written_in_the_largest_binary_unit_that_it_fills():
    sizes = map(format_size, (3 << 29, 1000 << 20, 2 << 40, 100))
    assert list(sizes) == ["1.5 GiB", "1000 MiB", "2 TiB", "100 B"]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Run a sweep whose second memory size fits no block; return the folder and the process."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "hybrid.json").write_text(large_state_config().to_json_string())
    requests = []
    for i in range(12):
        for turn in range(3):
            ids = (0, *(100 + 10 * i + k for k in range(turn + 2)))
            requests.append(TracedRequest(0, 512 * len(ids), 5, ids))
    write_trace(folder / "trace.jsonl", requests)
    command = [
        *(Path(sys.executable).with_name("vllm-hybrid-kv"), "replay", "trace.jsonl"),
        *("--model", "hybrid.json", "--concurrency", "2"),
        *("--memory", "64MiB", "--memory", "1MiB", "--memory", "256MiB"),
        *("--compare", "stock", "--compare", "fixed_point"),
        *("--json", "outcome.json", "--plot", "outcome.png"),
    ]
    # The command line overrides the environment.
    environment = {"VLLM_PLUGINS": "hybrid_kv", "VLLM_HYBRID_KV_COORDINATOR": "stock"}
    return folder, processes.run(command, cwd=folder, COLUMNS="100", **environment)


def test_strategies_are_compared_for_each_size_that_fits(outcome):
    _, done = outcome
    *_, error = done.stderr.splitlines()
    assert (done.returncode, error) == (
        2,
        "vllm-hybrid-kv replay: --memory 1 MiB: No available memory for the cache blocks. "
        "Increase --memory.",
    )
    _, small, large = done.stdout.split("36 requests")
    assert "64 MiB" in small
    assert "256 MiB" in large
    for table in (small, large):
        assert {"stock", "fixed_point", "hybrid_aware"} <= set(table.split())
        assert ("evicted blocks, mamba" in table) == (table is small)


def test_json_has_a_row_for_each_size_and_strategy(outcome):
    rows = json.loads((outcome[0] / "outcome.json").read_text())
    assert [(row["memory"], row["coordinator"]) for row in rows] == [
        (size, name)
        for size in (64 << 20, 256 << 20)
        for name in ("stock", "fixed_point", "hybrid_aware")
    ]
    for row in rows:
        assert row["requests"] == 36
        assert row["prompt_tokens"] == sum(512 * (turn + 3) for turn in range(3)) * 12
        assert row["hit_rate"] == row["hit_tokens"] / row["prompt_tokens"]
        assert len(row["progress"]) == 20
        assert row["step_ms"] > 0
    for stock, fixed_point, ours in (rows[:3], rows[3:]):
        assert ours["hit_tokens"] > fixed_point["hit_tokens"] > stock["hit_tokens"] > 0
    # The smaller cache evicts some states earlier than the attention blocks of their prefix.
    small, large = rows[2], rows[5]
    assert small["evicted_blocks"]["mamba"] > 0 < small["evicted_blocks"]["full_attention"]
    assert large["evicted_blocks"] == {}
    assert small["recomputed_tokens"] > 0 == large["recomputed_tokens"]


def test_the_hit_rates_are_drawn(outcome):
    drawn = image.imread(outcome[0] / "outcome.png")
    assert drawn.shape[:2] == (675, 1050)
    # Each strategy's curve has its own colour.
    colours = {tuple(pixel) for pixel in (drawn[..., :3] * 255).astype(int).reshape(-1, 3)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours


def test_host_memory_adds_hits_and_no_host_memory_changes_nothing(outcome):
    folder, _ = outcome
    command = [
        *(Path(sys.executable).with_name("vllm-hybrid-kv"), "replay", "trace.jsonl"),
        *("--model", "hybrid.json", "--concurrency", "2", "--memory", "64MiB"),
        *("--host-memory", "0", "--host-memory", "256MiB"),
        *("--json", "host.json", "--plot", "host.png"),
    ]
    done = processes.run(command, cwd=folder, COLUMNS="100", VLLM_PLUGINS="hybrid_kv")
    assert done.returncode == 0, done.stderr
    assert "from host memory" in done.stdout
    without, with_host = json.loads((folder / "host.json").read_text())
    before = json.loads((folder / "outcome.json").read_text())[2]
    timed = ("step_ms", "request_ms")
    assert {k: v for k, v in without.items() if k not in timed} == {
        k: v for k, v in before.items() if k not in timed
    }
    assert (without["host_memory"], with_host["host_memory"]) == (0, 256 << 20)
    assert 0 < with_host["host_hit_tokens"] <= with_host["hit_tokens"]
    assert with_host["hit_tokens"] > without["hit_tokens"]
    assert with_host["host_saved_seconds"] == with_host["host_hit_tokens"] / 20_000
    assert image.imread(folder / "host.png").shape[:2] == (675, 1050)


def test_a_wrong_size_of_host_memory_names_its_option():
    with pytest.raises(ToolError, match=r"--host-memory: '-1' is not a size of at least 0 bytes"):
        memory_size("-1", "--host-memory", least=0)
