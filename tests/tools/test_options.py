# SPDX-License-Identifier: Apache-2.0
"""The tools print vLLM's errors in one line, with the tools' options instead of the server's."""

import pytest
from transformers import LlamaConfig

from vllm_hybrid_kv.tools.options import UNKNOWN, in_tool_options, one_line


def caused_by(cause: Exception) -> Exception:
    try:
        raise RuntimeError("of a library") from cause
    except RuntimeError as error:
        return error


def missing_field() -> Exception:
    try:
        LlamaConfig().route_norm  # noqa: B018
    except AttributeError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(("error", "line"), [
    (ValueError("no\n such size"), "no such size"),
    (AssertionError("needs FlashInfer"), "needs FlashInfer"),
    (caused_by(ValueError("heads must be even")), "heads must be even"),
    (AssertionError(), UNKNOWN),
    (TypeError("'NoneType' object is not subscriptable"), UNKNOWN),
    (missing_field(),
        "the configuration has no 'route_norm', which vLLM's class of this model reads; add it to "
        "the config.json"),
])  # fmt: skip
def test_an_error_becomes_its_message_for_users_in_one_line(error, line):
    assert one_line(error) == line


@pytest.mark.parametrize(("message", "printed"), [
    ("Too long. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU "
        "backend) or decreasing `max_model_len` when initializing the engine. See "
        "https://docs.vllm.ai/ for more details.",
        "Too long. Increase --memory or decrease --max-model-len."),
    ("set boundary_layers=0 to quantise all; set VLLM_HYBRID_KV_UNIFY_PAGE_SIZES=min_waste",
        "pass --boundary-layers 0 to quantise all; pass --unify min_waste"),
    ("set prefix_match_unit=auto, raise --max-model-len",
        "set VLLM_HYBRID_KV_PREFIX_MATCH_UNIT=auto, raise --max-model-len"),
])  # fmt: skip
def test_advice_for_servers_names_the_options_of_the_tool(message, printed):
    assert in_tool_options(message) == printed
