# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv plan` agrees with engines that are started with the same arguments."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from testing.engine_host import BASE_ENVIRONMENT, EngineHost
from testing.model_cases import settings
from testing.processes import run

pytestmark = pytest.mark.engine

MEMORY = f"{BASE_ENVIRONMENT['VLLM_CPU_KVCACHE_SPACE']}GiB"


@pytest.mark.parametrize(("model", "boundary"), [("gemma3", 0), ("gemma3", 2), ("qwen3-next", 0)])
def test_the_plan_is_that_of_an_engine_with_the_same_arguments(
    host: EngineHost, small_model: Callable[..., Path], model: str, boundary: int
) -> None:
    of_plugin = {"hybrid_kv": {"boundary_layers": boundary}}
    arguments = settings(small_model(model), "bfloat16", additional_config=of_plugin)
    command = [
        *(Path(sys.executable).with_name("vllm-hybrid-kv"), "plan", arguments["model"]),
        *("--device", "cpu", "--memory", MEMORY, "--json", "-"),
        *("--boundary-layers", str(boundary)),
        *("--kv-cache-dtype", arguments["kv_cache_dtype"], "--enable-prefix-caching"),
        *("--max-num-seqs", str(arguments["max_num_seqs"]), "--max-model-len", "2048"),
        *("--max-num-batched-tokens", str(arguments["max_num_batched_tokens"])),
    ]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    plan = json.loads(done.stdout)["plan"]
    engine = host.engine(**arguments).plan()
    for name in ("reported_tokens", "reported_concurrency", "match_tokens"):
        assert plan[name] == engine[name]
    assert plan["scheduler_block_tokens"] == engine["scheduler_block_tokens"]
    assert plan["blocks"] == engine["blocks"] == engine["num_gpu_blocks"]
    assert plan["block_bytes"] * plan["blocks"] == engine["bytes"]
    pages = [
        [row["group"], layer, row["block_tokens"], row["page_bytes"]]
        for row in plan["pages"]
        for layer in row["layers"]
    ]
    assert sorted(pages) == sorted(map(list, engine["pages"]))
