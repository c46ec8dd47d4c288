# SPDX-License-Identifier: Apache-2.0
"""The tile sizes of an attention program on each GPU: measured if available, otherwise derived.

`python -m benchmarks.gpu --tune` tries the candidates on the current GPU and prints rows for
`MEASURED`. A GPU without rows uses `derived_tiling`, which follows from registers, shared memory
and spills of the machine code and from the cost of a split, not from a measurement.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton

from vllm_hybrid_kv.kernels.triton.convert import is_nvidia

MIN_SPLIT_TILES = 4
"""Smallest number of key tiles in a split. Writing and reading its partial result then costs less
than a tenth of reading its keys."""

PROGRAMS_PER_PROCESSOR = 4
"""Programs that each streaming multiprocessor needs to keep its memory busy."""

_TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


@dataclass(frozen=True)
class Tiling:
    """The tile sizes of a program, and how finely the keys of a row are split among programs.

    Attributes:
        block_m: Rows of a tile.
        block_n: Keys of a tile.
        num_warps: Warps.
        num_stages: Key tiles in flight.
        programs_per_processor: Programs wanted for each streaming multiprocessor.
        min_split_tiles: Smallest number of key tiles in a split, except for a row's last.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_processor: int = PROGRAMS_PER_PROCESSOR
    min_split_tiles: int = MIN_SPLIT_TILES

    @property
    def lanes(self) -> int:
        """Warps that get different keys in a tensor-core product, 16 keys each at a time."""
        return min(self.num_warps, self.block_n // 16)


class Rows(enum.Enum):
    """Classes of the number of rows: new tokens of a request times query heads of a KV head."""

    UP_TO_16 = 16
    UP_TO_32 = 32
    UP_TO_64 = 64
    MORE = 0


MOST_ROWS = (16, 32, 64, 65)
"""A number of rows of each class."""

HEAD_CLASSES = (64, 128, 256, 512)
"""Classes of head sizes: the powers of two to which products are padded."""

Key = tuple[tuple[int, int], int, Rows]
"""Compute capability (major, minor), head class, row class."""

MEASURED: Mapping[Key, Tiling] = {}
"""Results of `python -m benchmarks.gpu --tune`. No GPU has been measured yet."""


def head_class(head_size: int) -> int:
    """Return the class of a head size.

    Raises:
        ValueError: The head size is larger than every class.
    """
    for largest in HEAD_CLASSES:
        if head_size <= largest:
            return largest
    raise ValueError(
        f"k8v4 attention: head size {head_size} is larger than the maximum, {HEAD_CLASSES[-1]}"
    )


def row_class(rows: int) -> Rows:
    """Return the class of a number of rows."""
    return next((bounded for bounded in Rows if rows <= bounded.value), Rows.MORE)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU, None for any other device."""
    return torch.cuda.get_device_capability(device) if is_nvidia(device) else None


def has_tensor_memory(capability: tuple[int, int] | None) -> bool:
    """Return whether tensor cores have their own memory (10.x and 11.x)."""
    return capability is not None and 10 <= capability[0] < 12


def derived_tiling(rows: int, head_size: int, tensor_memory: bool = False) -> Tiling:
    """Return the tile sizes for a GPU without measurements.

    More rows share the cost of widening a key, until their accumulators no longer fit the
    registers. With Triton 3.9 no size here spills on compute capability 8.0 to 12.0. With four
    warps and 64 keys, or 64 dims of a quarter, Triton uses warp-group instructions: `wgmma` on
    9.0, which needs its second operand in shared memory, and on 10.0 tensor memory, with
    thousands of moves to and from it.

    Args:
        rows: Largest number of new tokens of a request, times query heads of a KV head.
        head_size: D.
        tensor_memory: The result of `has_tensor_memory`.
    """
    if head_size > 256:
        # Two warps, 64 keys or 32 rows spill inside the loop.
        return Tiling(16, 32, 4, 3)
    large = head_size > 128
    if rows <= 16 or (large and tensor_memory):
        # With 64 keys of large heads Triton 3.8 spills a seventeenth of the loop's instructions;
        # the versions before and after it spill none.
        return Tiling(16, 32 if large and _TRITON == (3, 8) else 64, 2, 3)
    if large:
        return Tiling(32, 64, 4, 3)
    return Tiling(32, 32, 2, 3) if rows <= 32 else Tiling(64, 32, 4, 2)


def tiling_for(rows: int, head_size: int, capability: tuple[int, int] | None) -> Tiling:
    """Return the tile sizes measured for a GPU, otherwise the derived ones.

    Args:
        rows: Largest number of new tokens of a request, times query heads of a KV head.
        head_size: D.
        capability: The result of `capability_of`.
    """
    if capability is not None:
        measured = MEASURED.get((capability, head_class(head_size), row_class(rows)))
        if measured is not None:
            return measured
    return derived_tiling(rows, head_size, has_tensor_memory(capability))


def origin(capability: tuple[int, int] | None) -> str:
    """Return 'measured' if the table has rows for a compute capability, otherwise 'derived'."""
    known = any(key[0] == capability for key in MEASURED)
    return "measured" if known else "derived"
