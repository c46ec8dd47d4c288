# SPDX-License-Identifier: Apache-2.0
"""Decodes, prefills and long prefills of a step are launched apart, and all are right.

Triton's interpreter runs our kernels. FlashAttention needs a GPU, so these tests give the layer a
torch implementation of it (`testing/triton/flash_attention.py`). The rest is the code that an
engine runs, and the orders of requests are those of vLLM's own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from testing.attention.steps import Request, call
from testing.triton.processes import Interpreter

TOLERANCE = 6e-3
"""Bound on ||out - reference|| / ||reference|| of a row: rounding outputs to bf16 adds 2^-9, and
rounding weights, queries and keys to fp16 a few times 2^-11."""

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    process = Interpreter()
    yield lambda *arguments: process(call, *arguments, module="launches")
    process.close()


# The numbers are tokens, new tokens, draft tokens, and whether the prompt is still incomplete.
REQUESTS = {
    "chunk": (60, 20, 0, True),
    "verification": (40, 4, 3),
    "long prompt": (150, 150, 0, True),
    "decode": (45, 1),
    "end of a prompt": (30, 3, 0, True),
    "long chunk": (180, 130, 0, True),
    "shorter verification": (33, 3, 2),
    "prompt": (20, 20, 0, True),
}
DECODES = ["decode", "end of a prompt", "shorter verification", "verification"]
PREFILLS = ["chunk", "prompt"]
LONG = ["long chunk", "long prompt"]


@pytest.mark.parametrize(
    "order", ["none", "V1, threshold of the drafts", "V1, threshold of 1", "V2"]
)
def test_each_launch_serves_its_requests_in_every_order(order: str, run: Run) -> None:
    requests = {name: Request(*numbers) for name, numbers in REQUESTS.items()}
    names, served, error = run("launches", requests, order)
    assert served == [DECODES, PREFILLS, LONG]
    assert error < TOLERANCE
    # Decodes lead, unless the threshold of another group makes verification a prefill.
    leading = sorted(names[: len(DECODES)]) == DECODES
    assert leading == (order in ("V1, threshold of the drafts", "V2"))


def test_without_flash_attention_our_own_kernel_serves_long_prefills(run: Run) -> None:
    requests = {name: Request(*numbers) for name, numbers in REQUESTS.items()}
    _, served, error = run("launches", requests, "none", False)
    assert served == [DECODES, sorted(PREFILLS + LONG)]
    assert error < TOLERANCE


def test_a_step_without_decodes_or_prefills_has_one_launch(run: Run) -> None:
    for name, new in (("decode", 1), ("prompt", 20), ("long prompt", 140)):
        _, served, error = run("launches", {name: Request(150, new)}, "none")
        assert served == [[name]]
        assert error < TOLERANCE


@pytest.mark.parametrize(("new", "kind"), [(127, "LaunchPlan"), (128, "PrefillPlan")])
def test_both_paths_agree_at_128_new_tokens(new: int, kind: str, run: Run) -> None:
    kinds, error, difference = run("path_difference", new)
    assert kinds == [kind]
    assert error < TOLERANCE
    assert difference < TOLERANCE


@pytest.mark.parametrize(
    ("cuts", "layer"),
    [([128], {}), ([40, 100], {}), ([128], {"sliding_window": 50})],
    ids=["two long chunks", "short chunks", "window"],
)
def test_outputs_do_not_depend_on_where_a_prompt_is_cut(
    cuts: list[int], layer: dict[str, Any], run: Run
) -> None:
    assert run("chunk_difference", cuts, layer) < TOLERANCE


@pytest.mark.parametrize("fault", [None, "base 2", "causal", "first key", "window"])
def test_the_self_test_finds_faults_of_flash_attention(fault: str | None, run: Run) -> None:
    # Without a window the first key weighs much.
    message = run("self_test", fault, {"sliding_window": 90} if fault == "window" else {})
    if fault is None:
        assert message == ""
    else:
        assert message.startswith("HybridKVKernelError: layer layer: the kernels triton:interpret")
        assert "a step of 128 new tokens has" in message


def test_profiling_reserves_the_workspace_of_long_prefills(run: Run) -> None:
    before, after = run("workspace_bytes", 1024)
    assert before == after == run("workspace_bytes", 65536)[0]
    # 8192 keys and values of 2 heads, 8192 queries of 4 heads: see `prefill_workspace`.
    assert before > 2 * 8192 * 2 * 64 * 2 + 8192 * 4 * 64 * (2 + 2 + 4)


def test_the_engine_start_launches_every_kernel_of_long_prefills(run: Run) -> None:
    assert run("not_warmed_up") == set()


@pytest.mark.parametrize(
    ("platform", "version", "head_size", "served"),
    [
        ("cuda", 2, 256, "FlashAttention 2"),
        ("cuda", 3, 128, "FlashAttention 3"),
        ("cuda", 4, 512, "FlashAttention 4"),
        ("cuda", 2, 512, "the k8v4 kernel, because FlashAttention 2 serves head sizes up to 256"),
        ("cuda", None, 128, "the k8v4 kernel, because this vLLM has no FlashAttention for this"),
        ("rocm", 2, 128, "the k8v4 kernel, because FlashAttention on AMD GPUs"),
    ],
)
def test_the_choice_of_flash_attention_is_logged(
    platform: str, version: int | None, head_size: int, served: str, monkeypatch: Any
) -> None:
    from vllm.v1.attention.backends import fa_utils

    from vllm_hybrid_kv.attention import flash

    lines: list[str] = []
    log = SimpleNamespace(info_once=lambda message, *values: lines.append(message % values))
    is_platform = SimpleNamespace(
        is_cuda=lambda: platform == "cuda", is_cuda_alike=lambda: platform != "cpu"
    )
    monkeypatch.setattr(flash, "logger", log)
    monkeypatch.setattr(flash, "current_platform", is_platform)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **options: version)
    monkeypatch.setattr(
        fa_utils, "flash_attn_varlen_func", lambda **options: options, raising=False
    )
    chosen = flash.choose(head_size, soft_cap=False)
    (line,) = lines
    assert line.startswith(f"Prefills of 128 or more tokens, head size {head_size}: {served}")
    assert (chosen is not None) == served.startswith("Flash")
    if chosen is not None:
        assert chosen.function(q=1) == {"q": 1, "fa_version": version}


@pytest.mark.parametrize(("ranks", "served"), [(1, True), (2, False)])
def test_context_parallel_ranks_do_not_attend_with_flash_attention(
    ranks: int, served: bool, monkeypatch: Any
) -> None:
    from vllm.v1.attention.backends import fa_utils

    from vllm_hybrid_kv.attention import flash

    config = SimpleNamespace(parallel_config=SimpleNamespace(decode_context_parallel_size=ranks))
    is_platform = SimpleNamespace(is_cuda=lambda: True, is_cuda_alike=lambda: True)
    monkeypatch.setattr(flash, "current_platform", is_platform)
    monkeypatch.setattr(flash, "get_current_vllm_config_or_none", lambda: config)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **options: 3)
    monkeypatch.setattr(
        fa_utils, "flash_attn_varlen_func", lambda **options: options, raising=False
    )
    assert (flash.choose(128, soft_cap=False) is not None) == served
