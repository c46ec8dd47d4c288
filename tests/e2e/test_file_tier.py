# SPDX-License-Identifier: Apache-2.0
"""Prefixes survive a restart in files: vLLM's secondary tier `fs` behind the host tier."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testing.engine_host import EngineHost, Output
from testing.model_cases import case_of, settings
from testing.processes import wait_until
from testing.tokenizer import random_prompt

pytestmark = pytest.mark.engine

CASE = case_of("qwen3-next")
UNIT = 64
# The last states that are cached for these prompts are inside blocks of 128 tokens.
PROMPTS = [random_prompt(350 + 130 * i, seed=i) for i in range(4)]
DAMAGED = [random_prompt(370 + 130 * i, seed=50 + i) for i in range(3)]
SALT = "tenant 1"
WRITTEN_S = 60.0


def arguments(model: Path, root: Path) -> dict[str, Any]:
    """Return the arguments of an engine with a small KV cache, host memory and files."""
    options = {
        "cpu_bytes_to_use": 100 << 20,
        "spec_name": "TieringOffloadingSpec",
        "secondary_tiers": [{"type": "fs", "root_dir": str(root), "n_read_threads": 1}],
    }
    transfer = {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": options,
    }
    policy = {"hybrid_kv": {"coordinator": "hybrid_aware", "prefix_match_unit": "auto"}}
    return settings(
        model,
        CASE.dtype,
        additional_config=policy,
        num_gpu_blocks_override=40,
        kv_transfer_config=transfer,
    )


def all_is_written(engine: EngineHost) -> bool:
    # vLLM stores blocks in the next step, and reports finished writes in later steps.
    engine.generate([random_prompt(4, seed=0)], 1)
    return engine.metrics()["vllm:kv_offload_tiering_active_cascade_jobs"] == 0


@dataclass(frozen=True)
class Restart:
    """An engine that wrote files has ended, and `engine` uses them in another process.

    Attributes:
        resumed: The outputs of the first engine for `PROMPTS`, which it got twice with `SALT`.
        computed: Its outputs for `DAMAGED`, which it got once.
    """

    root: Path
    engine: EngineHost
    resumed: list[Output]
    computed: list[Output]


@pytest.fixture(scope="module")
def restart(
    host: EngineHost, small_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Restart]:
    folder = tmp_path_factory.mktemp("files")
    started = arguments(small_model(CASE.model, CASE.dtype), folder / "tier")
    engine = host.engine(**started)
    engine.generate(PROMPTS, CASE.tokens, alone=True, salt=SALT)
    computed = engine.generate(DAMAGED, CASE.tokens, alone=True, salt=SALT)
    resumed = engine.generate(PROMPTS, CASE.tokens, alone=True, salt=SALT)
    assert wait_until(lambda: all_is_written(engine), WRITTEN_S)
    host.stop()
    with contextlib.closing(EngineHost(folder / "log.txt")) as second:
        second.engine(**started)
        yield Restart(folder / "tier", second, resumed, computed)


def bits(outputs: list[Output]) -> list[tuple[int, list[int], list[float]]]:
    return [(output.cached, output.tokens, output.logprobs) for output in outputs]


def test_a_tenant_hits_nothing_of_another_tenant_after_a_restart(restart: Restart) -> None:
    for salt in ("tenant 2", None):
        outputs = restart.engine.generate(PROMPTS, CASE.tokens, alone=True, salt=salt)
        assert [output.cached for output in outputs] == [0] * len(PROMPTS)


def test_a_restarted_engine_resumes_prompts_from_files(restart: Restart) -> None:
    outputs = restart.engine.generate(PROMPTS, CASE.tokens, alone=True, salt=SALT)
    assert [output.cached for output in outputs] == [
        (len(prompt) - 1) // UNIT * UNIT for prompt in PROMPTS
    ]
    assert bits(outputs) == bits(restart.resumed)


def test_files_that_are_too_short_are_computed_again(restart: Restart) -> None:
    for file in restart.root.rglob("*.bin"):
        os.truncate(file, file.stat().st_size // 2)
    outputs = restart.engine.generate(DAMAGED, CASE.tokens, alone=True, salt=SALT)
    assert [output.cached for output in outputs] == [0] * len(DAMAGED)
    assert bits(outputs) == bits(restart.computed)


def test_only_the_user_can_read_files_and_memory_has_no_name(restart: Restart) -> None:
    assert restart.root.stat().st_mode & 0o777 == 0o700
    assert [name for name in os.listdir("/dev/shm") if name.startswith("vllm_offload")] == []
