# SPDX-License-Identifier: Apache-2.0
"""Chats and logs of vLLM become traces that share prefixes as the recorded prompts did."""

from __future__ import annotations

import json
import logging
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner
from vllm.entrypoints.serve.utils.request_logger import RequestLogger
from vllm.sampling_params import SamplingParams

from testing.coordinator.prompts import POLICY, engine_of, hybrid_model
from testing.tokenizer import build_tokenizer
from vllm_hybrid_kv.tools.main import app
from vllm_hybrid_kv.tools.replay.scheduler import Replay
from vllm_hybrid_kv.tools.replay.trace import read_trace
from vllm_hybrid_kv.tools.trace.numbering import Recorded, numbered


def trace_of(prompts, block_size):
    return list(numbered([Recorded(0, prompt, 1) for prompt in prompts], 0, block_size))


def test_prompts_of_370_tokens_that_share_369_hit(tmp_path):
    prompts = [[*range(369), 1000 + i] for i in range(4)]
    for block_size in (512, 16):
        engine = engine_of(hybrid_model(tmp_path, 8192), 100, POLICY)
        hit = 369 // engine.hash_block_size * engine.hash_block_size if block_size == 16 else 0
        assert Replay(engine, trace_of(prompts, block_size), 1).run().hits == [0, hit, hit, hit]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=9), st.integers(1, 4))
def test_equal_ids_mean_equal_prefixes(prompts, block_size):
    requests = trace_of(prompts, block_size)
    for prompt, request in zip(prompts, requests, strict=True):
        assert len(request.hash_ids) == -(-len(prompt) // block_size)
        for other_prompt, other in zip(prompts, requests, strict=True):
            for i, pair in enumerate(zip(request.hash_ids, other.hash_ids, strict=False), 1):
                end = i * block_size
                assert (pair[0] == pair[1]) == (prompt[:end] == other_prompt[:end])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, build_tokenizer(folder)


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """A function that converts lines of text, and returns the result and the trace's requests."""
    monkeypatch.chdir(tmp_path)

    def convert(lines, *options):
        (tmp_path / "file").write_text("\n".join(lines))
        arguments = ["trace", "file", "--out", "trace.jsonl", "--json", "-", *map(str, options)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code in (0, 2), done.output
        return done, [] if done.exit_code else read_trace(tmp_path / "trace.jsonl")

    return convert


def chat(*texts, **fields):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return json.dumps({"messages": messages, **fields})


def test_each_answer_of_a_chat_becomes_a_request(convert, tokenizer, tmp_path):
    folder, encoder = tokenizer
    lines = [chat("the river runs", "slowly", "and then", "the boats"), "", chat("no answer")]
    done, requests = convert(lines, "--tokenizer", folder, "--block-size", 4)
    prompts = [
        "<|begin|><|user|>the river runs<|end|><|assistant|>",
        "<|begin|><|user|>the river runs<|end|><|assistant|>slowly<|end|><|user|>and then<|end|>"
        "<|assistant|>",
    ]
    tokens = [encoder.encode(prompt, add_special_tokens=False) for prompt in prompts]
    assert [request.input_length for request in requests] == list(map(len, tokens))
    answers = [len(encoder.encode(text)) + 1 for text in ("slowly", "the boats")]
    assert [request.output_length for request in requests] == answers
    full = len(tokens[0]) // 4
    assert requests[1].hash_ids[:full] == requests[0].hash_ids[:full]
    assert [request.timestamp for request in requests] == [0, 60_000]
    assert json.loads(done.stdout)["shareable_tokens"] == 4 * full
    assert set(json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[0])) == {
        *("timestamp", "input_length", "output_length", "hash_ids", "block_size")
    }


@pytest.mark.parametrize(
    ("lines", "times"),
    [
        # The second chat starts 1 s after the first, its second answer comes 60 s later.
        ([chat("a", "b"), chat("a", "b", "c", "d")], [0, 1, 61]),
        ([chat("a", "b", timestamp=105), chat("a", "b", timestamp=100)], [0, 5]),
        ([chat("a", "b", timestamp=t) for t in ("2026-12-01T10:00:03Z", 1796119200)], [0, 3]),
    ],
)
def test_requests_are_in_the_order_of_their_times(convert, tokenizer, lines, times):
    _, requests = convert(lines, "--tokenizer", tokenizer[0])
    assert [request.timestamp for request in requests] == [1000 * time for time in times]


def test_text_parts_and_tool_calls_reach_the_template_as_in_vllm(convert, tokenizer):
    parts = [{"type": "text", "text": "the river"}, {"type": "text", "text": "runs"}]
    call = {"function": {"name": "look", "arguments": "not JSON"}}
    rows = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    _, (joined,) = convert([json.dumps({"messages": rows})], "--tokenizer", tokenizer[0])
    _, (plain,) = convert([chat("the river\nruns", "")], "--tokenizer", tokenizer[0])
    assert joined == plain


IMAGE = json.dumps(
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant"}]}
)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "file, line 1: Invalid JSON"),
        ([chat("a", "b"), '{"messages": 1}'], "file, line 2: messages: .* array, got 1; a line is"),
        (["", '{"messages": [{}]}'], "file, line 2: messages: 0: role: Field required"),
        ([chat("a")], "file has no messages whose role is 'assistant'"),
        ([chat("a", "b"), chat("a", "b", timestamp=1)], "line 2: message 2 has a timestamp"),
        ([IMAGE], "line 1: message 1: a content part has the type 'image_url'; only text can"),
        ([chat("a", "b", timestamp="noon")], "timestamp: .* got 'noon'"),
    ],
)
def test_an_error_in_chats_names_the_line(convert, tokenizer, lines, message):
    done, _ = convert(lines, "--tokenizer", tokenizer[0])
    assert done.exit_code == 2
    assert re.search(message, done.stderr), done.stderr


@pytest.fixture(params=["text", "json"])
def server(request, tmp_path):
    """vLLM's request logger and a function that returns the lines that it has logged."""
    path = tmp_path / "server.log"
    handler = logging.FileHandler(path)
    plain = "(APIServer pid=7) %(levelname)s %(asctime)s [request_logger.py:55] %(message)s"
    handler.setFormatter(logging.Formatter(plain, "%m-%d %H:%M:%S"))
    if request.param == "json":
        handler.format = lambda record: json.dumps(
            {"asctime": "2026-12-31 23:59:59,001", "message": record.getMessage()}
        )
    logger = logging.getLogger("vllm.entrypoints.serve.utils.request_logger")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield RequestLogger(max_log_len=None), lambda: path.read_text().splitlines()
    logger.removeHandler(handler)
    logger.setLevel(level)


def log_prompt(logger, name, tokens, text="the river"):
    logger.log_inputs(name, text, tokens, None, SamplingParams(max_tokens=9), None)


def test_requests_of_a_log_have_its_prompts_and_answers(convert, server):
    logger, lines = server
    log_prompt(logger, "chat", [1, 2, 3, 4, 5], ", prompt_token_ids: [7], prompt_embeds shape: 1\n")
    log_prompt(logger, "stream", [1, 2, 3, 4, 6])
    logger.log_outputs("stream", "x", [8, 9], None, True, True)
    logger.log_outputs("chat", "it\nruns", [8, 9, 10], "stop")
    logger.log_outputs("stream", "y", [8], "stop", True, True)
    logger.log_outputs("stream", "xy", None, "streaming_complete", True)
    for i in range(2):
        log_prompt(logger, f"cmpl-{i}", [5, 6])
    for tokens in ([1], [1, 2]):
        logger.log_outputs("cmpl", "", tokens, "stop")
    log_prompt(logger, "aborted", [1])
    done, requests = convert(lines(), "--format", "vllm-log", "--block-size", 2)
    assert [request.output_length for request in requests] == [3, 3, 1, 2]
    ids = [(0, 1, 2), (0, 1, 3), (4,), (4,)]
    assert [request.hash_ids for request in requests] == ids
    assert "1 request without an answer left out" in json.loads(done.stdout)["notes"][0]
    _, requests = convert(lines(), "--format", "vllm-log", "--answer-tokens", 7)
    assert requests[-1].output_length == 7


def test_times_of_a_log_continue_in_the_next_year(convert):
    details = "details: prompt: '', prompt_token_ids: [1], prompt_embeds shape: None."
    lines = [f"12-31 23:59:50 Request a {details}", f"01-01 00:00:05 Request b {details}"]
    _, requests = convert(lines, "--format", "vllm-log", "--answer-tokens", 1)
    assert [request.timestamp for request in requests] == [0, 15_000]


RECEIVED = "INFO Received request a: params: SamplingParams(), lora_request: None."
PROMPT = "Request a details: prompt: '', prompt_token_ids: [1], prompt_embeds shape: None."


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["x"], "file has no requests; log with VLLM_LOGGING_LEVEL=DEBUG"),
        ([RECEIVED], "file has no token ids of prompts; log with VLLM_LOGGING_LEVEL=DEBUG"),
        ([PROMPT], "file has no token ids of answers; .* --answer-tokens"),
        (["x", "non-default args: {'max_log_len': 100}"], "line 2: .* truncated prompts to 100"),
    ],
)
def test_an_error_in_a_log_says_how_to_log(convert, lines, message):
    done, _ = convert(lines, "--format", "vllm-log")
    assert done.exit_code == 2
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "chat"], "'chat' is not a format: choose chats or vllm-log; did you mean"),
        ([], "chats need --tokenizer"),
        (["--tokenizer", "missing"], "--tokenizer: missing cannot be loaded"),
    ],
)
def test_a_wrong_option_is_named(convert, options, message):
    done, _ = convert([chat("a", "b")], *options)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
