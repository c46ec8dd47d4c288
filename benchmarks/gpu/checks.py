# SPDX-License-Identifier: Apache-2.0
"""Compare our kernels on the device with `kernels.reference` on the CPU.

A check takes the device, describes how large the kernels' error is, and raises if they are wrong.
Several processes share the checks, because most of their time is compiling.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.contenders.vllm_kernels import our_backend
from benchmarks.gpu.environment import Unavailable, device_for_kernels
from benchmarks.gpu.shapes import HEADS, OTHER_HEADS, Heads
from testing.triton import attention, store
from testing.triton.attention import Case, assert_close, attend, expected, make, planned

Check = Callable[[torch.device], str]


def attention_equals_the_reference(
    device: torch.device, *, split: bool | None = None, **case: Any
) -> str:
    batch = make(Case(**DEFAULT | case))
    on_device = batch.to(device)
    plan = None if split is None else planned(on_device, split=split)
    return assert_close(attend(on_device, plan), expected(batch))


def a_nan_scale_shows_in_the_rows_that_see_it(device: torch.device, queries: int) -> str:
    case = Case(**DEFAULT | {"lengths": (200,), "queries": (queries,)})
    batch = make(case)
    page, token = divmod(199 - queries // 2, case.page_size)
    for plane in ("key", "value"):
        batch.scales(0, case.num_kv_heads - 1, plane)[page][token] = torch.nan
    wanted = expected(batch)
    assert wanted[0].isnan().any(), "no row sees the NaN"
    return assert_close(attend(batch.to(device)), wanted)


def the_backend_gives_known_answers(
    device: torch.device, heads: Heads, dtype: torch.dtype, **layer: Any
) -> str:
    """Run the test that runs when an engine with such a layer starts."""
    our_backend(heads, dtype, device, test=True, **layer)
    return "within the bounds of kernels/known_answer.py"


def a_graph_follows_the_lengths(device: torch.device, queries: int) -> str:
    """Capture the plan and attention in one graph, and replay it with other lengths."""
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    # Reserve pages for the longest lengths that are replayed.
    longest = {"lengths": (2000, 1900, 1800, 1700), "queries": (queries,) * 4}
    batch = make(Case(**DEFAULT | longest, seed=1)).to(device)
    batch.seq_lens.copy_(torch.tensor((900, 64, 64, 64)))
    outputs = attend(batch, planned(batch))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(batch, planned(batch), into=outputs)
    errors = []
    for lengths in ((900, 64, 64, 64), (2000, 8, 1800, 17), (8, 8, 8, 1700), (2000, 1900, 1800, 8)):
        batch.seq_lens.copy_(torch.tensor(lengths))
        outputs[0].fill_(attention.UNWRITTEN)
        graph.replay()
        errors.append(assert_close(outputs, expected(batch)))
    return "; ".join(errors)


def stored_bytes_equal_the_reference(
    device: torch.device, head_size: int, dtype: torch.dtype, rows: str
) -> str:
    """Compare every byte of a cache, with negative slots and padding between blocks.

    Args:
        device: The kernel's device.
        head_size: D.
        dtype: The dtype of keys and values.
        rows: A name of `store.ROWS`.
    """
    key, value = store.ROWS[rows](head_size, dtype)
    count, heads, _ = key.shape
    slots = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0))[:count]
    slots[::7] = -1
    # Make keys and values views of one tensor, not contiguous, as a fused projection does.
    fused = torch.cat([key, value], dim=1).to(device)
    different = store.differing_bytes(fused[:, :heads], fused[:, heads:], slots, padding=64)
    assert different == 0, f"{different} bytes differ"
    return "all bytes equal"


@dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    Attributes:
        name: The check.
        outcome: passed, failed, unavailable or not run.
        detail: The error of the kernels, or the reason.
        seconds: Time, with compiling.
    """

    name: str
    outcome: str
    detail: str
    seconds: float


def run(named: tuple[str, Check]) -> CheckResult:
    """Run a check in this process."""
    name, check = named
    start = time.monotonic()
    try:
        outcome, detail = "passed", check(device_for_kernels())
    except Unavailable as reason:
        outcome, detail = "unavailable", str(reason)
    # A kernel that does not compile or launch fails the check, like a wrong number.
    except Exception as error:
        outcome, detail = "failed", f"{type(error).__name__}: {str(error)[:500]}"
    return CheckResult(name, outcome, detail, time.monotonic() - start)


DEFAULT: dict[str, Any] = {
    "head_size": 128, "num_heads": 8, "num_kv_heads": 2, "page_size": 16,
    "lengths": (700, 1, 0, 37, 64), "queries": (1, 1, 1, 1, 1),
}  # fmt: skip

MIXED: dict[str, Any] = {"lengths": (530, 1, 0, 20, 270), "queries": (1, 1, 0, 20, 70)}
"""Decode, a first token, an idle request, a whole prompt and a chunk, in one batch."""

_SINKS = torch.linspace(-3, 5, 8)
OPTIONS: dict[str, dict[str, Any]] = {
    "window of 1": {"window": 1},
    "window of 50": {"window": 50},
    "not causal": {"causal": False},
    "not causal, window": {"causal": False, "window": 30},
    "soft cap": {"soft_cap": 2.0},
    "sinks": {"sinks": _SINKS},
    "window, soft cap and sinks": {"window": 40, "soft_cap": 30.0, "sinks": _SINKS.bfloat16()},
}


def checks() -> dict[str, Check]:
    """Return all checks by name."""
    cases: dict[str, dict[str, Any]] = {}
    for head_size in (128, 256, 64, 72, 80, 96, 112, 160, 192, 512):
        cases[f"head size {head_size}"] = {"head_size": head_size}
    for group in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16):
        kv_heads = 2 if group <= 8 else 1
        heads = {"num_heads": group * kv_heads, "num_kv_heads": kv_heads}
        cases[f"{group} query heads of a KV head"] = heads
    for dtype in (torch.float16, torch.float32):
        cases[str(dtype)] = {"dtype": dtype}
    cases |= {name: {"options": options} for name, options in OPTIONS.items()}
    cases = {f"{name}, decode": case for name, case in cases.items()} | {
        f"{name}, mixed": case | MIXED for name, case in cases.items()
    }
    for name, options in OPTIONS.items():
        for split in (True, False):
            cases[f"{name}, mixed, split {split}"] = {"options": options, "split": split, **MIXED}
    for page_size in (48, 64, 128, 528, 2768):
        cases[f"pages of {page_size}"] = {"page_size": page_size, **MIXED}
    for queries in (2, 4, 8):
        for window in (None, 70):
            cases[f"{queries} new tokens, window {window}"] = {
                "lengths": (700, 33, 8), "queries": (queries,) * 3, "options": {"window": window},
            }  # fmt: skip
    cases["a chunk over context"] = {"lengths": (900,), "queries": (300,)}
    cases["a whole prompt"] = {"lengths": (600,), "queries": (600,)}
    cases["a long request"] = {"lengths": (20000, 3), "queries": (1, 1)}
    for size in (1e-7, 6e3):
        cases[f"values of {size}"] = {"value_size": size, "dtype": torch.float32}
    found: dict[str, Check] = {
        f"known answers, {heads}": partial(
            the_backend_gives_known_answers, heads=heads, dtype=torch.bfloat16
        )
        for heads in (*HEADS, *OTHER_HEADS, Heads(16, 8, 64), Heads(8, 8, 80), Heads(8, 1, 512))
    }
    found |= {
        f"attention, {name}": partial(attention_equals_the_reference, **case)
        for name, case in cases.items()
    }
    for queries in (1, 14):
        name = f"a NaN scale shows in the rows that see it, {queries} new tokens"
        found[name] = partial(a_nan_scale_shows_in_the_rows_that_see_it, queries=queries)
    for queries in (1, 4):
        name = f"a graph follows the lengths, {queries} new tokens"
        found[name] = partial(a_graph_follows_the_lengths, queries=queries)
    for rows, dtype, head_size in itertools.product(
        store.ROWS, (torch.bfloat16, torch.float16, torch.float32), (64, 80, 128, 256, 512)
    ):
        if rows != "of all 16-bit numbers" or dtype is not torch.float32:
            found[f"stored bytes, rows {rows}, {dtype}, head size {head_size}"] = partial(
                stored_bytes_equal_the_reference, head_size=head_size, dtype=dtype, rows=rows
            )
    return found


def few_checks() -> dict[str, Check]:
    """Return one tiny check of each kind, for the interpreter."""
    tiny: dict[str, Any] = {"head_size": 64, "num_heads": 4}
    attends = partial(attention_equals_the_reference, **tiny)
    heads = Heads(4, 1, 64)
    return {
        "known answers": partial(
            the_backend_gives_known_answers, heads=heads, dtype=torch.float16
        ),
        "attention, decode": partial(attends, lengths=(70, 1, 0), queries=(1, 1, 1)),
        "attention, mixed": partial(attends, lengths=(40, 9), queries=(3, 9)),
        "a NaN scale shows": partial(a_nan_scale_shows_in_the_rows_that_see_it, queries=4),
        "a graph follows the lengths": partial(a_graph_follows_the_lengths, queries=1),
        "stored bytes": partial(
            stored_bytes_equal_the_reference,
            head_size=64, dtype=torch.bfloat16, rows="with NaN and infinity",
        ),
    }  # fmt: skip
