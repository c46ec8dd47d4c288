# SPDX-License-Identifier: Apache-2.0
"""Which checks are made of the kernels on a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.correctness import (
    ROWS,
    Case,
    Check,
    a_graph_follows_the_lengths,
    a_nan_shows_where_it_is_seen,
    a_way_is_like_its_twin,
    attention_is_as_defined,
    stored_bits_are_the_references,
)
from vllm_hybrid_kv.kernels.triton.convert import KeyWords, ValueWords

MIXED: dict[str, Any] = {"lengths": (530, 1, 0, 20, 270), "queries": (1, 1, 0, 20, 70)}
"""Decode, a first token, an idle request, a whole prompt and a chunk, in one batch."""


def _attention(name: str, split: bool | None = None, **case: Any) -> Check:
    arguments = {"case": Case(**case), "split": split}
    return Check(f"attention, {name}", attention_is_as_defined, arguments)


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
    for head_size in (128, 256, 64, 72, 80, 96, 112, 160, 192):
        yield _attention(f"head size {head_size}, decode", head_size=head_size)
        yield _attention(f"head size {head_size}, mixed", head_size=head_size, **MIXED)
    for group in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16):
        kv_heads = 2 if group <= 8 else 1
        heads: dict[str, Any] = {"heads": group * kv_heads, "kv_heads": kv_heads}
        yield _attention(f"{group} query heads of a KV head, decode", **heads)
        yield _attention(f"{group} query heads of a KV head, mixed", **heads, **MIXED)
    for page_size in (48, 64, 128, 528, 2768):
        yield _attention(f"pages of {page_size}", page_size=page_size, **MIXED)
    for dtype in (torch.float16, torch.float32):
        yield _attention(f"{dtype}, decode", dtype=dtype)
        yield _attention(f"{dtype}, mixed", dtype=dtype, **MIXED)
    for name, options in OPTIONS.items():
        for split in (True, False):
            way = "split" if split else "not split"
            yield _attention(f"{name}, mixed, {way}", split, options=options, **MIXED)
        yield _attention(f"{name}, decode", options=options)
    for queries in (2, 4, 8):
        for window in (None, 70):
            options = {"window": window}
            name = f"{queries} new tokens" + ("" if window is None else f", window of {window}")
            lengths = (700, 33, 8)
            yield _attention(name, lengths=lengths, queries=(queries,) * 3, options=options)
    yield _attention("a chunk over context", lengths=(900,), queries=(300,))
    yield _attention("a whole prompt", lengths=(600,), queries=(600,))
    yield _attention("a long request", lengths=(20000, 3), queries=(1, 1))
    for size in (1e-7, 6e3):
        yield _attention(f"values of {size}", value_size=size, dtype=torch.float32)


def _other_checks() -> Iterator[Check]:
    for new, name in ((1, "decode"), (14, "several tokens")):
        case = Case(lengths=(200,), queries=(new,))
        yield Check(f"a NaN shows where it is seen, {name}", a_nan_shows_where_it_is_seen,
                    {"case": case})  # fmt: skip
    for keys in KeyWords:
        for values in ValueWords:
            for head_size in (128, 256):
                yield Check(
                    f"keys by {keys.name}, values by {values.name}, head size {head_size}",
                    a_way_is_like_its_twin,
                    {"case": Case(head_size=head_size), "keys": keys, "values": values},
                )
    for queries in (1, 4):
        yield Check(f"a graph follows the lengths, {queries} new tokens",
                    a_graph_follows_the_lengths, {"queries": queries})  # fmt: skip
    for native in (True, False):
        way = "native e4m3" if native else "integer e4m3"
        for rows in ROWS:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                if rows == "of all 16-bit numbers" and dtype is torch.float32:
                    continue
                for head_size in (64, 80, 128, 256):
                    yield Check(
                        f"stored bits, rows {rows}, {dtype}, {way}, head size {head_size}",
                        stored_bits_are_the_references,
                        {"head_size": head_size, "dtype": dtype, "native": native, "rows": rows},
                    )


def checks(smallest: bool = False) -> list[Check]:
    """Return the matrix; a handful of it for the interpreter."""
    if not smallest:
        return [*_attention_checks(), *_other_checks()]
    tiny: dict[str, Any] = {"head_size": 64, "heads": 4, "kv_heads": 2}
    case = Case(**tiny, lengths=(70, 1, 0), queries=(1, 1, 1))
    twins = {"case": case, "keys": KeyWords.PORTABLE, "values": ValueWords.PORTABLE}
    native = {"case": case, "keys": KeyWords.NATIVE_PTX, "values": ValueWords.PTX}
    bits = {"head_size": 64, "dtype": torch.bfloat16, "native": False}
    return [
        Check("attention, decode", attention_is_as_defined, {"case": case}),
        _attention("mixed", lengths=(40, 9), queries=(3, 9), **tiny),
        Check("a NaN shows where it is seen", a_nan_shows_where_it_is_seen,
              {"case": Case(**tiny, lengths=(40,), queries=(4,))}),
        Check("keys and values by PORTABLE", a_way_is_like_its_twin, twins),
        Check("keys by NATIVE_PTX", a_way_is_like_its_twin, native),
        Check("a graph follows the lengths", a_graph_follows_the_lengths, {"queries": 1}),
        Check("stored bits", stored_bits_are_the_references,
              {**bits, "rows": "with NaN and infinity"}),
    ]  # fmt: skip
