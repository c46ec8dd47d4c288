# SPDX-License-Identifier: Apache-2.0
"""`vllm-hybrid-kv plan` beside engines that are started with the same arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from testing.engine_host import BASE_ENVIRONMENT, EngineHost
from testing.workload import Case, settings

pytestmark = pytest.mark.engine

MEMORY = f"{BASE_ENVIRONMENT['VLLM_CPU_KVCACHE_SPACE']}GiB"


def planned(model: Path, *arguments: str) -> dict[str, Any]:
    """Return the command's plan of an engine of this machine, and its text."""
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("vllm-hybrid-kv"), "plan", model, "--device", "cpu"),
            *("--memory", MEMORY, "--json", "-", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)["plan"]


@pytest.mark.parametrize("model", ["llama", "gemma3", "qwen3-next"])
def test_the_plan_is_what_an_engine_of_the_same_arguments_has(
    host: EngineHost, small_model: Callable[[str, str], Path], model: str
) -> None:
    case = Case(model, "bfloat16", rounding=0.0, tokens=1, candidates=1)
    folder = small_model(model, case.dtype)
    arguments = settings(folder, case)
    plan = planned(
        folder,
        *("--kv-cache-dtype", arguments["kv_cache_dtype"], "--enable-prefix-caching"),
        *("--max-num-seqs", str(arguments["max_num_seqs"]), "--max-model-len", "2048"),
        *("--max-num-batched-tokens", str(arguments["max_num_batched_tokens"])),
    )
    engine = host.engine(**arguments).plan()
    assert plan["blocks"] == engine["blocks"] == engine["num_gpu_blocks"]
    assert plan["block_bytes"] * plan["blocks"] == engine["bytes"]
    assert plan["reported_tokens"] == engine["reported_tokens"]
    assert plan["reported_concurrency"] == engine["reported_concurrency"]
    assert plan["match_tokens"] == engine["match_tokens"]
    assert plan["scheduler_block_tokens"] == engine["scheduler_block_tokens"]
    pages = [
        [row["group"], layer, row["block_tokens"], row["page_bytes"]]
        for row in plan["pages"]
        for layer in row["layers"]
    ]
    assert sorted(pages) == sorted(map(list, engine["pages"]))
