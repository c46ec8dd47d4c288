# SPDX-License-Identifier: Apache-2.0
"""The metrics of a hybrid model's prefix cache on /metrics of `vllm serve` during chats."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from testing.processes import wait_until
from testing.server import Server, serve
from testing.tokenizer import random_prompt

pytestmark = [pytest.mark.engine, pytest.mark.both_minors]

CHATS, TURNS = 3, 3
BEGINNING = 300
"""Tokens with which all chats begin: more than two blocks, so that attention layers hit."""

SETTLED_S = 60.0
"""After this time the server has received the counters of its engine."""

ANY = "any"


@dataclass(frozen=True)
class Scrape:
    """The content of /metrics.

    Attributes:
        values: By name and label `kind` (`ANY` if it has none).
        labels: Model and engine, by name.
        help: By name, without `_total`.
    """

    values: dict[tuple[str, str], float]
    labels: dict[str, tuple[str, str]]
    help: dict[str, str]

    def of(self, name: str, kind: str = ANY) -> float:
        return self.values[f"vllm_hybrid_kv:{name}_total", kind]


@dataclass(frozen=True)
class Served:
    """A server that answered chats, and was stopped with SIGTERM.

    Attributes:
        before: Its metrics before the first request.
        after: Several scrapes after the last request.
        cached: For each request, the tokens from the cache by the server's answer.
        folders: Names and permissions of the folders of metrics in its temporary folder.
        left: Those that it left behind.
    """

    before: Scrape
    after: list[Scrape]
    cached: list[int]
    folders: dict[str, int]
    left: list[str]


def scrape(server: Server) -> Scrape:
    found = Scrape({}, {}, {})
    for family in server.metrics():
        found.help[family.name] = family.documentation
        for sample in family.samples:
            if sample.name.startswith(("vllm_hybrid_kv:", "vllm:prefix_cache_")):
                name = sample.name, sample.labels.get("kind", ANY)
                assert name not in found.values, f"{name} twice"
                found.values[name] = sample.value
                found.labels[sample.name] = sample.labels["model_name"], sample.labels["engine"]
    return found


def chat(url: str, model: str) -> list[int]:
    """Send chats whose turns alternate; return each request's tokens from the cache."""
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
            assert answer.status_code == httpx.codes.OK, answer.text
            details = answer.json()["usage"]["prompt_tokens_details"]
            cached.append((details or {}).get("cached_tokens") or 0)
            chats[i] = chats[i] + random_prompt(30 + 10 * i, seed=100 * turn + i)[1:]
    return cached


@pytest.fixture(scope="module", params=["1", "2"], ids=["one API server", "two API servers"])
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
        with serve(model, arguments, folder / "server.log") as (server, _):
            before = scrape(server)
            cached = chat(server.url, str(model))

            def settled() -> bool:
                values = scrape(server).values
                ours = values.get(("vllm_hybrid_kv:prefix_cache_requests_total", ANY), 0)
                return values["vllm:prefix_cache_queries_total", ANY] > 0 and ours == len(cached)

            assert wait_until(settled, SETTLED_S), scrape(server)
            time.sleep(0.2)
            after = [scrape(server) for _ in range(4)]
            folders = {
                path.name: stat.S_IMODE(path.stat().st_mode)
                for path in temporary.iterdir()
                if list(path.glob("counter_hybrid-kv-*.db"))
            }
        left = [name for name in os.listdir(temporary) if name in folders or "hybrid" in name]
    return Served(before, after, cached, folders, left)


def test_the_counters_agree_with_vllms_and_with_the_answers(served: Served) -> None:
    for after in served.after:
        hits = after.values["vllm:prefix_cache_hits_total", ANY]
        assert hits == sum(served.cached) > 0
        assert after.of("prefix_cache_hit_tokens", "full_attention") == hits
        assert after.of("prefix_cache_hit_tokens", "mamba") == hits
        assert after.of("prefix_cache_requests") == CHATS * TURNS
        name = "vllm_hybrid_kv:prefix_cache_hit_tokens_total"
        assert after.labels[name] == after.labels["vllm:prefix_cache_hits_total"]


def test_the_counters_show_the_kind_that_shortened_the_hits(served: Served) -> None:
    after = served.after[-1]
    reach = after.of("prefix_cache_alone_tokens", "full_attention")
    lost = after.of("prefix_cache_lost_tokens", "mamba")
    assert after.of("prefix_cache_hit_tokens", "mamba") + lost == reach
    # The second chat shows where it leaves the first one; only the third can resume there.
    assert lost > BEGINNING / 2
    assert after.of("prefix_cache_limited_requests", "mamba") >= 1
    assert after.of("prefix_cache_limited_requests", "full_attention") == 0
    assert after.of("prefix_cache_alone_tokens", "mamba") >= sum(served.cached)


def test_kept_and_used_checkpoints_are_counted(served: Served) -> None:
    after = served.after[-1]
    kept, used = (
        sum(value for (name, _), value in after.values.items() if name == f"vllm_hybrid_kv:{what}")
        for what in ("checkpoints_kept_total", "checkpoints_used_total")
    )
    assert kept > 0
    assert used == sum(tokens > 0 for tokens in served.cached)


def test_every_counter_starts_at_0_and_has_a_help_text(served: Served) -> None:
    ours = {name for name, _ in served.before.values if name.startswith("vllm_hybrid_kv:")}
    assert len(ours) == 9
    for (name, _), value in served.before.values.items():
        assert value == 0 or name not in ours
    for name in ours:
        assert len(served.before.help[name.removesuffix("_total")]) > 30


def test_one_folder_that_only_its_owner_can_read_is_used_and_removed(served: Served) -> None:
    assert list(served.folders.values()) == [0o700]
    assert not served.left
