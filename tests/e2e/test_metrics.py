# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` shows the metrics of a hybrid model's prefix cache on /metrics during chats."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.samples import Sample

from testing.processes import wait_until
from testing.server import serve
from testing.tokenizer import random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.both_minors]

CHATS, TURNS = 3, 3
BEGINNING = 300
"""Length of the beginning that all chats share: over two blocks, so that attention layers hit."""

SETTLED_S = 60.0
"""How long the server may take to show the counters of its engine."""

OURS = "vllm_hybrid_kv:"


@dataclass(frozen=True)
class Served:
    """Observations of a server that answered chats and was then stopped with SIGTERM.

    `after` holds scrapes of its metrics, `cached` the number of cached tokens of each answer,
    `folders` the permissions of its metrics folders, `left` the folders that it left behind.
    """

    after: list[list[Sample]]
    cached: list[int]
    folders: dict[str, int]
    left: list[str]


def value(samples: list[Sample], name: str, kind: str | None = None) -> float:
    """Return the value of the sample with this name and label `kind`; there must be only one."""
    (found,) = (s.value for s in samples if s.name == name and s.labels.get("kind") == kind)
    return found


def ours(samples: list[Sample], name: str, kind: str | None = None) -> float:
    return value(samples, f"{OURS}prefix_cache_{name}_total", kind)


def chat(url: str, model: str) -> list[int]:
    """Send the turns of several chats; return how many tokens of each request were cached."""
    beginning = random_prompt(BEGINNING, seed=7)
    chats = [beginning + random_prompt(300, seed=70 + i)[1:] for i in range(CHATS)]
    cached = []
    for turn in range(TURNS):
        for i in range(CHATS):
            answer = httpx.post(
                f"{url}/v1/completions",
                json={"model": model, "prompt": chats[i], "max_tokens": 3, "ignore_eos": True},
                timeout=300,
            )
            details = answer.raise_for_status().json()["usage"]["prompt_tokens_details"]
            cached.append((details or {}).get("cached_tokens") or 0)
            chats[i] = chats[i] + random_prompt(30 + 10 * i, seed=100 * turn + i)[1:]
    return cached


@pytest.fixture(
    scope="module",
    params=["1", pytest.param("2", marks=pytest.mark.long)],
    ids=["one API server", "two API servers"],
)
def served(
    request: pytest.FixtureRequest,
    small_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Served:
    model = small_model("qwen3-next")
    folder = tmp_path_factory.mktemp("served")
    temporary = folder / "tmp"
    temporary.mkdir()
    policy = {"coordinator": "hybrid_aware", "prefix_match_unit": "auto"}
    arguments = [
        *("--kv-cache-dtype", "turboquant_k8v4", "--enforce-eager", "--enable-prefix-caching"),
        *("--gpu-memory-utilization", "0.3", "--max-model-len", "2048", "--max-num-seqs", "8"),
        *("--additional-config", json.dumps({"hybrid_kv": policy})),
        *("--api-server-count", request.param, "--enable-prompt-tokens-details"),
    ]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TMPDIR", str(temporary))
        for name in ("PROMETHEUS_MULTIPROC_DIR", "HYBRID_KV_METRICS_DIR"):
            environment.delenv(name, raising=False)
        with serve(model, arguments, folder / "server.log") as server:
            cached = chat(server.url, str(model))
            assert wait_until(
                lambda: (
                    ours(server.samples(), "requests") == len(cached)
                    and server.metric("vllm:prefix_cache_queries_total") > 0
                ),
                SETTLED_S,
            )
            after = [server.samples() for _ in range(4)]
            folders = {
                path.name: stat.S_IMODE(path.stat().st_mode)
                for path in temporary.iterdir()
                if list(path.glob("counter_hybrid-kv-*.db"))
            }
        left = [name for name in os.listdir(temporary) if name in folders or "hybrid" in name]
    return Served(after, cached, folders, left)


def test_the_counters_agree_with_vllms_and_with_the_answers(served: Served) -> None:
    for after in served.after:
        hits = value(after, "vllm:prefix_cache_hits_total")
        assert hits == sum(served.cached) > 0
        assert ours(after, "hit_tokens", "full_attention") == hits
        assert ours(after, "hit_tokens", "mamba") == hits
        assert ours(after, "requests") == CHATS * TURNS
        names = f"{OURS}prefix_cache_requests_total", "vllm:prefix_cache_hits_total"
        one, other = (next(s.labels for s in after if s.name == name) for name in names)
        assert one == other


def test_one_folder_that_only_its_owner_can_read_is_used_and_removed(served: Served) -> None:
    assert list(served.folders.values()) == [0o700]
    assert not served.left
