# SPDX-License-Identifier: Apache-2.0
"""Measure how far the two paths of GPU prefills, and prompts cut into chunks, are apart.

    TRITON_INTERPRET=1 python -m benchmarks.prefill_paths

Triton's interpreter runs our kernels, and a torch implementation stands in for FlashAttention.
Outputs are float32, so that only the rounding inside of the kernels shows.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch

from benchmarks.markdown import table
from testing.triton import prefill
from testing.triton.attention import Case, attend, expected, make

CASES: tuple[tuple[int, dict[str, Any]], ...] = (
    (64, {}),
    (128, {}),
    (256, {}),
    (128, {"window": 100}),
)
LENGTH, FIRST = 300, 160
CUTS = ([200], [230, 256])


def difference(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return ||got - wanted|| / ||wanted|| of each row."""
    return (got.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)


def row(head_size: int, options: dict[str, Any]) -> list[str]:
    """Measure one case, and return the row of the table."""
    case = Case(
        lengths=(LENGTH,), queries=(LENGTH - FIRST,), head_size=head_size, num_heads=4,
        num_kv_heads=2, dtype=torch.float32, options=options,
    )  # fmt: skip
    batch = make(case)
    reference, _ = expected(batch)
    whole, _ = prefill.attend(batch, rows=128, piece=128)
    own, _ = attend(batch)
    chunks = []
    for cuts in CUTS:
        for start, end in itertools.pairwise([FIRST, *cuts, LENGTH]):
            chunk = make(case)
            rows = slice(start - FIRST, end - FIRST)
            chunk.query = batch.query[rows]
            chunk.seq_lens = torch.tensor([end], dtype=torch.int32)
            chunk.query_start_loc = torch.tensor([0, end - start], dtype=torch.int32)
            out, _ = prefill.attend(chunk, rows=64, piece=128)
            chunks.append(difference(out, whole[rows]))
    exact_query, _ = expected(batch, integer_query=False)
    measured = (
        difference(whole, reference),
        difference(own, reference),
        difference(whole, own),
        torch.cat(chunks),
        difference(reference.bfloat16(), reference),
        difference(reference, exact_query),
    )
    name = f"{head_size}{', window' if options else ''}"
    return [name, *(f"{one.mean():.1e}, {one.max():.1e}" for one in measured)]


def main() -> None:
    warnings.simplefilter("ignore", RuntimeWarning)
    columns = (
        "D", "FlashAttention path, from reference", "own kernel, from reference",
        "between paths", "between chunks", "rounding outputs to bf16", "rounding queries to int8",
    )  # fmt: skip
    print(*table(columns, [row(*case) for case in CASES]), sep="\n")


if __name__ == "__main__":
    main()
