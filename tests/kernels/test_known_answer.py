# SPDX-License-Identifier: Apache-2.0
"""Wrong kernels fail the known-answer test, and correct kernels pass it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from vllm_hybrid_kv.attention.cpu import CpuKernels
from vllm_hybrid_kv.errors import HybridKVKernelError
from vllm_hybrid_kv.kernels import known_answer, reference
from vllm_hybrid_kv.kernels.cpu import isa, quantise
from vllm_hybrid_kv.kernels.k8v4 import Layout, PageFormat
from vllm_hybrid_kv.kernels.known_answer import Call, Variant, WrongKernelError

CPU = torch.device("cpu")
VARIANT = Variant(64, 4, 2, 16, torch.bfloat16)
WINDOW = Variant(64, 4, 2, 16, torch.bfloat16, window=True)
CAPPED = Variant(64, 4, 2, 16, torch.bfloat16, soft_cap=True)
SINKS = Variant(64, 4, 2, 16, torch.bfloat16, sinks=torch.bfloat16)
QUERIES = [1, 3, 33]
SPEC: Any = SimpleNamespace(block_size=48)


@pytest.fixture(autouse=True)
def nothing_tested() -> None:
    known_answer.forget()


def store(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Store tokens as a correct kernel would."""
    reference.store(reference.quantise(key, value), cache, slots, Layout.LINEAR)


def attend(call: Call, **changes: Any) -> None:
    """Attend as a correct kernel would, except that `changes` replace arguments of the call."""
    options = {**call, **changes}
    out = options.pop("out")
    out.copy_(reference.paged_attention(layout=Layout.LINEAR, **options)[0])


def require(
    variant: Variant, stores: Callable[..., None] = store, attends: Callable[..., None] = attend
) -> None:
    known_answer.require("cpu:test", variant, [(QUERIES, attends)], stores, CPU)


def test_kernels_can_be_compiled_before_they_are_tested() -> None:
    calls: list[list[Any]] = []
    attends = Mock(side_effect=attend)

    def compile_first(launch: Callable[[], object]) -> None:
        launch()
        calls.append(attends.call_args_list[:])

    known_answer.require(
        "cpu:test", VARIANT, [([1], attends), ([3], attends)], store, CPU, compile_first
    )
    assert len(calls) == 1
    assert len(calls[0]) == 2
    assert attends.call_count == 4


def values_one_byte_further(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    store(key, value, cache, slots)
    page = PageFormat(key.shape[-1], cache.shape[2], Layout.LINEAR)
    for block in {int(slot) // page.page_size for slot in slots if slot >= 0}:
        values = cache[block].flatten(1)[:, page.value_offset : page.key_scale_offset]
        values.copy_(values.roll(1, dims=1))


def swapped_nibbles(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    store(key, value.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), cache, slots)


def unrotated_keys(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    store(reference.rotate(key.float()).to(key.dtype), value, cache, slots)


def unrotated_values(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    store(key, reference.rotate(value.float()).to(value.dtype), cache, slots)


def swapped_scales(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    quantised = reference.quantise(key, value)
    scales = quantised.value_scale, quantised.key_scale
    reference.store(reference.Quantised(*quantised[:2], *scales), cache, slots, Layout.LINEAR)


def lost_last_token(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    store(key[:-1], value[:-1], cache, slots[:-1])


def nan_ignored(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
    store(key.nan_to_num(0.0), value.nan_to_num(0.0), cache, slots)


def hidden_scales_used(call: Call) -> None:
    """Attend like a kernel that multiplies an unseen token's weight, 0, by its infinite scale."""
    attend(call)
    head_size, page_size = call["query"].shape[-1], call["cache"].shape[2]
    start = PageFormat(head_size, page_size, Layout.LINEAR).key_scale_offset
    scales = call["cache"].flatten(2)[..., start : start + 2 * page_size].contiguous()
    if scales.view(torch.float16).isinf().any():
        call["out"].fill_(math.nan)


@pytest.mark.parametrize("variant", [VARIANT, WINDOW, CAPPED, SINKS], ids=str)
def test_the_reference_passes_and_is_tested_once_in_a_process(variant: Variant) -> None:
    calls = []

    def counted(call: Call) -> None:
        calls.append(call)
        attend(call)

    require(variant, attends=counted)
    count = len(calls)
    require(variant, attends=counted)
    assert len(calls) == count > 0


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (values_one_byte_further, "a relative error of"),
        (swapped_nibbles, "a relative error of"),
        (unrotated_keys, "a relative error of"),
        (unrotated_values, "a relative error of"),
        (swapped_scales, "a relative error of"),
        (lost_last_token, "has"),
        (nan_ignored, "NaN in other places than the reference"),
    ],
)
def test_a_wrong_store_kernel_fails(wrong: Callable[..., None], error: str) -> None:
    with pytest.raises(WrongKernelError, match=f"fail their known-answer test.* {error}.* bound"):
        require(VARIANT, stores=wrong)


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [
        (VARIANT, partial(attend, causal=False)),
        (WINDOW, partial(attend, window=None)),
        (WINDOW, partial(attend, window=known_answer.WINDOW + 1)),
        (WINDOW, partial(attend, window=known_answer.WINDOW - 1)),
        (CAPPED, partial(attend, soft_cap=0.0)),
        (SINKS, partial(attend, sinks=None)),
        (VARIANT, partial(attend, scale=64**-0.5 * 1.05)),
        (VARIANT, partial(attend, window=256)),  # sees only the last 256 tokens, one split
        (VARIANT, hidden_scales_used),
    ],
)
def test_a_wrong_attention_kernel_fails(variant: Variant, wrong: Callable[..., None]) -> None:
    with pytest.raises(WrongKernelError):
        require(variant, attends=wrong)


def test_the_message_names_the_kernels_the_step_the_error_and_the_bound() -> None:
    batches = [([1], lambda call: call["out"].zero_())]
    with pytest.raises(WrongKernelError) as caught:
        known_answer.require("cpu:test", WINDOW, batches, store, CPU)
    assert str(caught.value).startswith(
        "the kernels cpu:test (head size 64, 4 query heads on 2 KV heads, pages of 16 tokens, "
        "bfloat16, sliding window) fail their known-answer test: decode has "
    )
    assert str(caught.value).endswith("the bound is 0.01")


@pytest.mark.parametrize(
    ("group", "expected"), [(1, [1, 2, 8, 17]), (3, [1, 2, 6]), (8, [1, 3]), (40, [1])]
)
def test_new_tokens_fill_every_class_of_rows(group: int, expected: list[int]) -> None:
    assert known_answer.steps(group, (1, 2, 8, 17)) == expected


def layer(head_size: int, sinks: Tensor | None = None) -> Any:
    return SimpleNamespace(
        num_heads=6, num_kv_heads=2, head_size=head_size, scale=1.0, soft_cap=30.0,
        sliding_window=100, sinks=sinks,
    )  # fmt: skip


@pytest.mark.parametrize("path", isa.available())
@pytest.mark.parametrize("head_size", [64, 72, 512])
def test_the_cpu_kernels_pass(head_size: int, path: str) -> None:
    layers = {"plain": layer(head_size), "sinks": layer(head_size, torch.zeros(6).bfloat16())}
    CpuKernels(path, debug=True).warm_up(
        layers, SPEC, torch.bfloat16, CPU, max_requests=1, decode_query_len=1
    )


def test_a_wrong_cpu_kernel_is_reported_with_its_layers_and_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = quantise.quantise_and_store

    def half_scales(key: Tensor, value: Tensor, *more: Any, **debug: Any) -> None:
        right(key, value / 2, *more, **debug)

    monkeypatch.setattr(quantise, "quantise_and_store", half_scales)
    path = isa.available()[-1]
    layers = dict.fromkeys(("a", "b", "c"), layer(64))
    with pytest.raises(HybridKVKernelError) as caught:
        CpuKernels(path, debug=True).warm_up(
            layers, SPEC, torch.bfloat16, CPU, max_requests=1, decode_query_len=1
        )
    message = str(caught.value)
    assert message.startswith(f"layer a and 2 more: the kernels cpu:{path} (head size 64, ")
    assert "has a relative error of 0.5, the bound is 0.01. Serve the model with --kv-" in message
    assert message.endswith("" if path == "portable" else " or with the setting cpu_isa=portable")
