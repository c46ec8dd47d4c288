# SPDX-License-Identifier: Apache-2.0
"""Clients that hang up and engines that are killed: vLLM recovers, and nothing is left behind."""

from __future__ import annotations

import pytest

from testing.server_crash import STREAMS, Crash, crash

pytestmark = pytest.mark.engine

K8V4 = ("--kv-cache-dtype", "turboquant_k8v4")


@pytest.fixture(scope="module")
def ours(small_model, tmp_path_factory) -> Crash:
    return crash(small_model("llama"), tmp_path_factory.mktemp("ours"), "EngineCore", *K8V4)


def test_a_client_that_hangs_up_stops_only_its_own_request(ours):
    assert ours.running_after_hang_up == 0
    assert ours.answered_after_hang_up == 5


def test_a_killed_engine_ends_the_server_and_no_stream_looks_complete(ours):
    assert ours.ended_by_itself
    assert len(ours.broken_off) == STREAMS, ours.endings
    assert ours.processes == []


def test_a_killed_engine_leaves_no_file_of_the_plugin(ours):
    assert [name for name in ours.temporary if "hybrid" in name] == []
    assert ours.mapped


@pytest.mark.long
@pytest.mark.parametrize(
    ("process", "arguments"),
    [("EngineCore", ()), ("Worker_TP1", ("--tensor-parallel-size", "2"))],
)
def test_a_killed_process_ends_the_server_as_it_does_without_the_plugin(
    small_model, tmp_path_factory, monkeypatch, nobind, process, arguments
):
    def run(name, *more):
        return crash(
            small_model("llama"), tmp_path_factory.mktemp(name), process, *arguments, *more
        )

    ours = run("ours", *K8V4)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    stock = run("stock")
    print(ours, stock, sep="\n")
    assert ours.running_after_hang_up == 0
    assert ours.ended_by_itself == stock.ended_by_itself
    # On a busy machine one of stock vLLM's four streams looked complete, twice.
    assert 1 <= len(stock.broken_off) <= len(ours.broken_off) == STREAMS
    assert ours.processes == stock.processes
    assert len(ours.shared_memory) <= len(stock.shared_memory)
    assert len(ours.temporary) <= len(stock.temporary)
    assert [name for name in ours.temporary if "hybrid" in name] == []
