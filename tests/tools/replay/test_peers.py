# SPDX-License-Identifier: Apache-2.0
"""The simulated policies of peers hit where their states are, and never exceed their memory."""

from __future__ import annotations

import json
import os
import random
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from testing.models import large_state_config
from vllm_hybrid_kv.tools.main import app
from vllm_hybrid_kv.tools.output import ToolError
from vllm_hybrid_kv.tools.replay.peers.loop import Sizes
from vllm_hybrid_kv.tools.replay.peers.marconi import Marconi
from vllm_hybrid_kv.tools.replay.peers.sglang import SGLang
from vllm_hybrid_kv.tools.replay.peers.tree import Tree
from vllm_hybrid_kv.tools.replay.trace import TracedRequest, write_trace

STATE = 1000
"""Bytes of a state. A token has one byte."""


def sizes(memory):
    return Sizes(memory, STATE, 1, 100.0, 0.1)


POLICIES = [SGLang, lambda sizes: Marconi(sizes, 0.0), lambda sizes: Marconi(sizes, 2.0)]


def common(one, other):
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), max_size=8)


@settings(deadline=None)
@given(SEQUENCES, SEQUENCES, st.randoms())
def test_the_tree_finds_the_longest_prefix_and_the_deepest_state(inserted, sought, draw):
    tree, states = Tree(), set()
    for units in inserted:
        node = tree.insert(units)
        assert node.depth == len(units)
        if draw.random() < 0.5:
            tree.set_state(node, True)
            states.add(units)
    distinct = {units[:end] for units in inserted for end in range(1, len(units) + 1)}
    assert (tree.units, tree.states) == (len(distinct), len(states))
    for units in sought:
        node, matched = tree.match(units)
        assert matched == max((common(units, other) for other in inserted), default=0)
        fitting = [len(state) for state in states if units[: len(state)] == state]
        assert node.depth == max(fitting, default=0)


@settings(deadline=None)
@given(SEQUENCES, st.randoms())
def test_a_node_that_is_merged_with_its_child_stays_in_the_tree(inserted, draw):
    tree = Tree()
    for units in inserted:
        tree.set_state(tree.insert(units), True)
    before = tree.units
    single = [node for node in tree.nodes if len(node.children) == 1]
    if single:
        tree.merge_with_child(draw.choice(single))
    assert tree.units == before
    assert all(tree.match(units)[1] == len(units) for units in inserted)
    assert tree.states == sum(node.state for node in tree.nodes)


def blocks(*ids, answer=10):
    return TracedRequest(0, 512 * len(ids), answer, ids)


@pytest.mark.parametrize(
    ("policy", "hits"),
    [
        # The first prompt's state is at its end, and the second prompt continues it. The third
        # prompt computes the shared block again and caches a state there, where the fourth resumes.
        (SGLang, [0, 1024, 0, 512]),
        # The second prompt repeats the first answer, whose last whole unit ends at 1,024.
        (lambda sizes: Marconi(sizes, 1.0), [0, 1024, 0, 512]),
    ],
)
def test_requests_resume_at_ends_of_prompts_and_at_branch_points(policy, hits):
    sent = [blocks(1, 2), blocks(1, 2, 3), blocks(1, 4), blocks(1, 5)]
    assert policy(sizes(100 * STATE)).run(sent, 1, 8192).hits == hits


def test_only_marconi_resumes_at_the_end_of_a_short_answer():
    # The second prompt starts with the first prompt and its answer, 1,224 tokens.
    sent = [blocks(1, 2, answer=200), blocks(1, 2, 3)]
    assert SGLang(sizes(100 * STATE)).run(sent, 1, 8192).hits == [0, 1024]
    assert Marconi(sizes(100 * STATE), 1.0).run(sent, 1, 8192).hits == [0, 1216]


def test_sglang_caches_a_state_every_256_tokens_of_an_answer():
    sent = [blocks(1, 2, answer=300), blocks(1, 2, 3)]
    assert SGLang(sizes(100 * STATE)).run(sent, 1, 8192).hits == [0, 1280]


def chats(seed, count=60):
    draw = random.Random(seed)
    chats, sent = [[0, 10_000 + i] for i in range(6)], []
    for i in range(count):
        chat = draw.choice(chats)
        chat.append(i + 1)
        sent.append(TracedRequest(0, 512 * len(chat) + draw.randrange(512), 20, (*chat, -1 - i)))
    return [
        TracedRequest(0, one.input_length, 20, one.hash_ids[: -(-one.input_length // 512)])
        for one in sent
    ]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("memory", [20_000, 60_000, 150_000])
def test_a_peer_never_exceeds_its_memory(policy, memory):
    peer = policy(sizes(memory))
    most = 0

    def watched(method):
        def call(request, *arguments):
            nonlocal most
            method(request, *arguments)
            running = [one for one in peer.running if one.done < one.total]
            tokens = peer.reserved(running) + peer.unit * peer.tree.units
            most = max(most, tokens + STATE * (peer.tree.states + len(running)))
            assert peer.tree.units == sum(len(node.key) for node in peer.tree.nodes)
            pinned = sum(len(node.key) for node in peer.tree.nodes if node.pins)
            assert peer.tree.pinned == pinned

        return call

    peer.computed, peer.finish = watched(peer.computed), watched(peer.finish)
    tally = peer.run(chats(0), 4, 2048)
    assert tally.requests == 60
    assert most <= memory
    assert all(node.pins == 0 for node in peer.tree.nodes)


def test_more_memory_hits_more():
    for policy in POLICIES:
        rates = [policy(sizes(size)).run(chats(1), 4, 2048).hit_rate for size in (24_000, 10**7)]
        assert rates[0] < rates[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_that_cannot_fit_is_named(policy):
    with pytest.raises(ToolError, match="request 2 of the trace has 12,298 tokens, more than"):
        policy(sizes(12_000)).run([TracedRequest(0, 20, 1, (1,)), blocks(*range(2, 26))], 1, 8192)


def test_replay_compares_peers_with_a_coordinator(tmp_path, restored_environment):
    (tmp_path / "hybrid.json").write_text(large_state_config().to_json_string())
    write_trace(tmp_path / "trace", [blocks(1, 2), blocks(1, 2, 3), blocks(1, 4), blocks(1, 5)])
    arguments = ["replay", tmp_path / "trace", "--model", tmp_path / "hybrid.json"]
    options = ["--memory", "256MiB", "--concurrency", 1, "--json", tmp_path / "rows"]
    peers = ["--compare", "sglang", "--compare", "marconi"]
    os.environ.pop("VLLM_HYBRID_KV_COORDINATOR", None)
    done = CliRunner().invoke(app, [str(one) for one in (*arguments, *options, *peers)])
    assert done.exit_code == 0, done.output
    rows = {row["coordinator"]: row for row in json.loads((tmp_path / "rows").read_text())}
    hits = {name: row["hit_tokens"] for name, row in rows.items()}
    assert hits["sglang"] == hits["marconi"] == 1024 + 512
    assert hits["hybrid_aware"] > 1500
    assert rows["sglang"]["progress"][-1] == rows["sglang"]["hit_rate"]


def test_a_peer_cannot_be_the_coordinator(restored_environment):
    arguments = ["replay", "trace", "--model", "m", "--memory", "1GiB", "--coordinator", "sglang"]
    done = CliRunner().invoke(app, arguments)
    assert "'sglang' is not a strategy" in done.stderr
