# SPDX-License-Identifier: Apache-2.0
"""Our kernels on the device against `kernels.reference` on the CPU.

A check is a function of this module with its arguments. It returns a description of the error,
and raises if the kernels are wrong. Several processes share the checks, because most of their
time is compiling.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.environment import Unavailable, device_for_kernels
from testing.triton import attention, store
from testing.triton.attention import Case, assert_close, attend, expected, make, planned
from vllm_hybrid_kv.kernels.triton.convert import (
    KeyDecoder,
    ValueDecoder,
    has_native_e4m3,
    is_nvidia,
)

DECODER_TOLERANCE = 1e-3
"""Largest relative difference between two decoders: both give the same numbers, and only the
order of sums differs."""


def attention_equals_the_reference(
    device: torch.device, case: Case, split: bool | None = None
) -> str:
    batch = make(case)
    on_device = batch.to(device)
    plan = None if split is None else planned(on_device, split=split)
    return assert_close(attend(on_device, plan), expected(batch))


def a_nan_scale_shows_in_the_rows_that_see_it(device: torch.device, case: Case) -> str:
    batch = make(case)
    position = case.lengths[0] - case.queries[0] // 2 - 1
    page, token = divmod(position, case.page_size)
    batch.scales(0, case.num_kv_heads - 1)[page][token] = torch.nan
    wanted = expected(batch)
    assert wanted[0].isnan().any(), "no row sees the NaN"
    return assert_close(attend(batch.to(device)), wanted)


def decoders_agree(device: torch.device, case: Case, keys: KeyDecoder, values: ValueDecoder) -> str:
    """Compare two decoders with the reference and with the portable ones."""
    if (keys, values) != (KeyDecoder.PORTABLE, ValueDecoder.PORTABLE) and not is_nvidia(device):
        raise Unavailable("PTX needs an NVIDIA GPU")
    if keys is KeyDecoder.NATIVE_PTX and not has_native_e4m3(device):
        raise Unavailable("the GPU has no e4m3fn conversion")
    batch = make(case)
    on_device = batch.to(device)
    got = attend(on_device, key_decoder=keys, value_decoder=values)
    assert_close(got, expected(batch))
    portable = attend(
        on_device, key_decoder=KeyDecoder.PORTABLE, value_decoder=ValueDecoder.PORTABLE
    )
    return assert_close(got, portable, DECODER_TOLERANCE)


def a_graph_follows_the_lengths(device: torch.device, queries: int) -> str:
    """Capture plan and attention together, and replay with other lengths."""
    if device.type != "cuda":
        raise Unavailable("CUDA graphs need a GPU")
    shapes: dict[str, Any] = {**DEFAULT, "queries": (queries,) * 4}
    # Pages for the longest request of all.
    longest = make(Case(**{**shapes, "lengths": (2000, 1900, 1800, 1700)}, seed=1))
    batch = longest.to(device)
    batch.seq_lens.copy_(torch.tensor((900, 64, 64, 64)))
    plan = planned(batch)
    outputs = attend(batch, plan)
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        planned(batch, into=plan)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planned(batch, into=plan)
        attend(batch, plan, into=outputs)
    errors = []
    for lengths in ((900, 64, 64, 64), (2000, 8, 1800, 17), (8, 8, 8, 1700), (2000, 1900, 1800, 8)):
        batch.seq_lens.copy_(torch.tensor(lengths))
        outputs[0].fill_(attention.UNWRITTEN)
        graph.replay()
        errors.append(assert_close(outputs, expected(batch)))
    return "; ".join(errors)


def stored_bytes_equal_the_reference(
    device: torch.device, head_size: int, dtype: torch.dtype, native: bool, rows: str
) -> str:
    """Compare every byte of a cache, with negative slots and padding between blocks.

    Args:
        device: Where.
        head_size: D.
        dtype: Of keys and values.
        native: As for `quantise_and_store`.
        rows: A name of `store.ROWS`.
    """
    if native and not has_native_e4m3(device):
        raise Unavailable("the GPU has no e4m3fn conversion")
    key, value = store.ROWS[rows](head_size, dtype)
    count, heads, _ = key.shape
    slots = torch.randperm(2 * count, generator=torch.Generator().manual_seed(0))[:count]
    slots[::7] = -1
    # Keys and values of a fused projection are views of one tensor, not contiguous.
    fused = torch.cat([key, value], dim=1).to(device)
    different = store.differing_bytes(
        fused[:, :heads], fused[:, heads:], slots, padding=64, native=native
    )
    assert different == 0, f"{different} bytes differ"
    return "all bytes equal"


@dataclass(frozen=True)
class Check:
    """A function of this module, its arguments, and its name in the report."""

    name: str
    function: Callable[..., str]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class CheckResult:
    """The result of a check; `seconds` include compiling."""

    name: str
    outcome: str
    """passed, failed, unavailable or not run."""
    detail: str
    """The error of the kernels, or the reason."""
    seconds: float


def run(check: Check) -> CheckResult:
    """Run a check in this process."""
    start = time.monotonic()
    try:
        outcome, detail = "passed", check.function(device_for_kernels(), **check.arguments)
    except Unavailable as reason:
        outcome, detail = "unavailable", str(reason)
    # A kernel that does not compile or launch is a failure like a wrong number.
    except Exception as error:
        outcome, detail = "failed", f"{type(error).__name__}: {str(error)[:500]}"
    return CheckResult(check.name, outcome, detail, time.monotonic() - start)


DEFAULT: dict[str, Any] = {
    "head_size": 128, "num_heads": 8, "num_kv_heads": 2, "page_size": 16,
    "lengths": (700, 1, 0, 37, 64), "queries": (1, 1, 1, 1, 1),
}  # fmt: skip

MIXED: dict[str, Any] = {"lengths": (530, 1, 0, 20, 270), "queries": (1, 1, 0, 20, 70)}
"""Decode, a first token, an idle request, a whole prompt and a chunk, in one batch."""


def _attention(name: str, split: bool | None = None, **case: Any) -> Check:
    arguments = {"case": Case(**DEFAULT | case), "split": split}
    return Check(f"attention, {name}", attention_equals_the_reference, arguments)


OPTIONS: dict[str, dict[str, Any]] = {
    "window of 1": {"window": 1},
    "window of 50": {"window": 50},
    "not causal": {"causal": False},
    "not causal, window": {"causal": False, "window": 30},
    "soft cap": {"soft_cap": 2.0},
    "sinks": {"sinks": torch.linspace(-3, 5, 8)},
    "window, soft cap and sinks": {
        "window": 40,
        "soft_cap": 30.0,
        "sinks": torch.linspace(-3, 5, 8).bfloat16(),
    },
}


def _attention_checks() -> Iterator[Check]:
    variants: dict[str, dict[str, Any]] = {}
    for head_size in (128, 256, 64, 72, 80, 96, 112, 160, 192):
        variants[f"head size {head_size}"] = {"head_size": head_size}
    for group in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16):
        kv_heads = 2 if group <= 8 else 1
        heads = {"num_heads": group * kv_heads, "num_kv_heads": kv_heads}
        variants[f"{group} query heads of a KV head"] = heads
    for dtype in (torch.float16, torch.float32):
        variants[str(dtype)] = {"dtype": dtype}
    for name, case in variants.items():
        yield _attention(f"{name}, decode", **case)
        yield _attention(f"{name}, mixed", **case, **MIXED)
    for page_size in (48, 64, 128, 528, 2768):
        yield _attention(f"pages of {page_size}", page_size=page_size, **MIXED)
    for name, options in OPTIONS.items():
        yield _attention(f"{name}, mixed, split", True, options=options, **MIXED)
        yield _attention(f"{name}, mixed, not split", False, options=options, **MIXED)
        yield _attention(f"{name}, decode", options=options)
    for queries in (2, 4, 8):
        for window in (None, 70):
            yield _attention(
                f"{queries} new tokens, window {window}",
                lengths=(700, 33, 8), queries=(queries,) * 3, options={"window": window},
            )  # fmt: skip
    yield _attention("a chunk over context", lengths=(900,), queries=(300,))
    yield _attention("a whole prompt", lengths=(600,), queries=(600,))
    yield _attention("a long request", lengths=(20000, 3), queries=(1, 1))
    for size in (1e-7, 6e3):
        yield _attention(f"values of {size}", value_size=size, dtype=torch.float32)


def _other_checks() -> Iterator[Check]:
    for queries in (1, 14):
        case = Case(**DEFAULT | {"lengths": (200,), "queries": (queries,)})
        name = f"a NaN scale shows in the rows that see it, {queries} new tokens"
        yield Check(name, a_nan_scale_shows_in_the_rows_that_see_it, {"case": case})
    for keys in KeyDecoder:
        for values in ValueDecoder:
            for head_size in (128, 256):
                yield Check(
                    f"keys by {keys.name}, values by {values.name}, head size {head_size}",
                    decoders_agree,
                    {
                        "case": Case(**DEFAULT | {"head_size": head_size}),
                        "keys": keys,
                        "values": values,
                    },
                )
    for queries in (1, 4):
        name = f"a graph follows the lengths, {queries} new tokens"
        yield Check(name, a_graph_follows_the_lengths, {"queries": queries})
    for native in (True, False):
        for rows in store.ROWS:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                if rows == "of all 16-bit numbers" and dtype is torch.float32:
                    continue
                for head_size in (64, 80, 128, 256):
                    yield Check(
                        f"stored bytes, rows {rows}, {dtype}, "
                        f"{'native' if native else 'integer'} e4m3, head size {head_size}",
                        stored_bytes_equal_the_reference,
                        {"head_size": head_size, "dtype": dtype, "native": native, "rows": rows},
                    )


def checks(smallest: bool = False) -> list[Check]:
    """Return all checks, or a handful of tiny ones for the interpreter."""
    if not smallest:
        return [*_attention_checks(), *_other_checks()]
    tiny: dict[str, Any] = {"head_size": 64, "num_heads": 4, "num_kv_heads": 2, "page_size": 16}
    decode = {"case": Case(**tiny, lengths=(70, 1, 0), queries=(1, 1, 1))}
    portable = {"keys": KeyDecoder.PORTABLE, "values": ValueDecoder.PORTABLE}
    ptx = {"keys": KeyDecoder.NATIVE_PTX, "values": ValueDecoder.PTX}
    rows = {"head_size": 64, "dtype": torch.bfloat16, "native": False}
    nan = {"case": Case(**tiny, lengths=(40,), queries=(4,))}
    return [
        Check("attention, decode", attention_equals_the_reference, decode),
        _attention("mixed", **tiny, lengths=(40, 9), queries=(3, 9)),
        Check("a NaN scale shows in the rows that see it",
              a_nan_scale_shows_in_the_rows_that_see_it, nan),
        Check("keys and values by PORTABLE", decoders_agree, decode | portable),
        Check("keys by NATIVE_PTX", decoders_agree, decode | ptx),
        Check("a graph follows the lengths", a_graph_follows_the_lengths, {"queries": 1}),
        Check("stored bytes", stored_bytes_equal_the_reference,
              {**rows, "rows": "with NaN and infinity"}),
    ]  # fmt: skip
