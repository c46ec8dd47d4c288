# SPDX-License-Identifier: Apache-2.0
"""For any config.json, the tools print a plan, or one line that names the file or the field."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from testing.models import large_state_config
from testing.shapes import SHAPES
from tests.fuzz.json_values import damaged, encoded, json_values, with_a_change
from vllm_hybrid_kv.tools.main import app
from vllm_hybrid_kv.tools.plan.model_description import DescriptionError, described
from vllm_hybrid_kv.tools.replay.trace import TracedRequest, write_trace

MODELS = [
    json.loads((SHAPES[name] / "config.json").read_text())
    for name in ("llama-3.1-8b", "gemma-3-27b", "gpt-oss-20b", "llama-4-scout")
]
"""A text model, two multimodal models, and one with quantised weights."""

LLAMA, HYBRID = MODELS[0], json.loads(large_state_config().to_json_string())
READ_BY_US = (
    *("architectures", "model_type", "quantization_config", "text_config", "llm_config"),
    *("dtype", "num_hidden_layers"),
)
"""The fields that our code reads before vLLM does."""

VALUES = json_values("LlamaForCausalLM", "llama", "fp8", "modelopt", "bfloat16") | st.sampled_from(
    (
        {"quant_method": "modelopt", "quantization": 5},
        {"quant_method": 5, "kv_cache_scheme": {"num_bits": 8}},
        {"architectures": [[]], "model_type": []},
        {"quantization_config": ["fp8"]},
        10**9,
    )
)


def described_as(content: bytes) -> str:
    """Write `content` to a config.json and read it; return the error message, "" if it is valid."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_bytes(content)
        try:
            with described(path) as model:
                json.loads((Path(model.folder) / "config.json").read_text())
        except DescriptionError as error:
            return str(error).replace(str(path), "FILE")
    return ""


CONFIGS = st.sampled_from(MODELS).flatmap(
    lambda config: with_a_change(config, VALUES, (*READ_BY_US, *sorted(config)))
)
FILES = (
    CONFIGS.map(encoded)
    | st.sampled_from(MODELS).map(encoded).flatmap(damaged)
    | VALUES.map(encoded)
    | st.binary(max_size=40)
)


@settings(max_examples=400, deadline=None)
@example(b"[" * 100_000)
@example(encoded(LLAMA)[:-1] + b', "extra": ' + b"[" * 700 + b"]" * 700 + b"}")
@example(b'{"num_hidden_layers": ' + b"1" * 5000 + b"}")
@example(encoded({**LLAMA, "quantization_config": {"quant_method": "modelopt", "quantization": 1}}))
@example(encoded({**LLAMA, "quantization_config": ["fp8"]}))
@example(encoded({**LLAMA, "quantization_config": {"quant_method": 5}}))
@example(encoded({**LLAMA, "text_config": {"architectures": 5}}))
@example(encoded({**LLAMA, "text_config": {"architectures": [[]], "model_type": {}}}))
@example(encoded({**LLAMA, "text_config": {"quantization_config": 5}}))
@given(FILES)
def test_any_file_describes_a_model_or_is_refused(content):
    message = described_as(content)
    assert not message or message.startswith("FILE") or "is multimodal" in message, message
    assert len(message) < 600


@pytest.mark.parametrize("name", ["n" * 5000, "a\0b", "/dev/null", "/proc/self/mem"])
def test_a_path_that_is_not_a_file_is_refused(name):
    with pytest.raises(DescriptionError), described(Path(name)):
        pass


@pytest.fixture(scope="module")
def invoke() -> Iterator[Callable[..., Result]]:
    """A function that runs a command in this process. A new process takes 10 s to import vLLM."""
    before, level = dict(os.environ), logging.getLogger("vllm").level
    yield lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)])
    os.environ.clear()
    os.environ.update(before)
    logging.getLogger("vllm").setLevel(level)


def assert_done_or_refused(done: Result, command: str) -> None:
    assert done.exit_code in (0, 2), done.exception
    assert isinstance(done.exception, SystemExit | None), repr(done.exception)
    if done.exit_code == 2:
        # A replay also prints its progress to standard error.
        (line,) = (line for line in done.stderr.splitlines() if "hit rate" not in line)
        assert line.startswith(f"vllm-hybrid-kv {command}: "), line


READ_BY_VLLM = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "layer_types"),
    *("num_hidden_layers", "max_position_embeddings", "vocab_size", "rope_parameters", "dtype"),
    *("num_experts", "linear_num_key_heads", "linear_key_head_dim", "linear_conv_kernel_dim"),
)
"""The fields that vLLM and transformers read when they build the layers."""

WRONG = st.sampled_from((0, -1, 3, 2**40, 1e300, 0.5, "", "7", None, True, [], {}, ["x"], [[0]]))


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(config=with_a_change(HYBRID, WRONG, READ_BY_VLLM))
def test_any_model_is_planned_and_replayed_or_refused_in_one_line(invoke, tmp_path, config):
    path = tmp_path / "changed.json"
    path.write_bytes(encoded(config))
    trace = tmp_path / "trace.jsonl"
    write_trace(trace, [TracedRequest(0, 600, 4, (1, 2))])
    planned = invoke("plan", path, "--memory", "1GiB", "--kv-cache-dtype", "auto")
    assert_done_or_refused(planned, "plan")
    assert_done_or_refused(
        invoke("replay", trace, "--model", path, "--memory", "1GiB", "--json", "-"), "replay"
    )


def test_a_replay_of_too_long_a_request_ends_with_one_line(invoke, tmp_path):
    (tmp_path / "hybrid.json").write_bytes(encoded(HYBRID))
    trace = tmp_path / "trace.jsonl"
    long: list[Any] = [TracedRequest(0, 600, 4, (1, 2)), TracedRequest(0, 20480, 120, (3,) * 40)]
    write_trace(trace, long)
    done = invoke("replay", trace, "--model", tmp_path / "hybrid.json", "--memory", "1GiB")
    assert_done_or_refused(done, "replay")
    assert done.exit_code == 2
    words = "request 2 of the trace has 20,480 prompt tokens and 120 answer tokens, more than"
    assert words in done.stderr
