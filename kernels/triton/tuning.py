# SPDX-License-Identifier: Apache-2.0
"""Choose the tile sizes of an attention program: measured ones if a GPU has them, else derived.

`python -m benchmarks.gpu --tune` tries the candidates on the current GPU and prints rows for
`MEASURED`. A GPU without rows uses `derived_tiling`. Its sizes were derived from the machine code
(registers, shared memory, spills) and from the cost of a split, not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton

from vllm_hybrid_kv.kernels.triton.convert import is_nvidia

Capability = tuple[int, int] | None
"""The compute capability of an NVIDIA GPU, such as (9, 0); None for an AMD GPU."""


@dataclass(frozen=True)
class Tiling:
    """The tile sizes of a program, and how finely the keys of a row are split among programs.

    Attributes:
        block_m: Rows of a tile.
        block_n: Keys of a tile.
        num_warps: Warps.
        num_stages: As Triton counts them. Triton spreads them over two loads, of a block number and
            then of its keys: 3 and 4 give one buffer and no prefetch, 5 gives two buffers.
        programs_per_processor: How many programs each streaming multiprocessor gets. The registers
            of four programs of two warps always fit.
        min_split_tiles: A split has at least this many key tiles, except a row's last split. From
            four on, writing and reading a partial result costs less than a tenth of reading its
            keys.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_processor: int = 4
    min_split_tiles: int = 4

    @property
    def lanes(self) -> int:
        """How many warps get different keys in a tensor-core product, 16 keys each at a time."""
        return min(self.num_warps, self.block_n // 16)


MOST_ROWS = (8, 16, 32, 64, 65)
"""Tilings are chosen for these numbers of rows; 65 stands for any larger number. A request has as
many rows as new tokens times query heads of a KV head."""

MEASURED: Mapping[tuple[Capability, int, int], Tiling] = {}
"""Results of `python -m benchmarks.gpu --tune`, by compute capability, head size rounded up to a
power of two, and `row_class`. No GPU has been measured yet."""


def row_class(rows: int) -> int:
    """Round the number of rows up to the next entry of `MOST_ROWS`; more than 65 rows give 65."""
    return next((most for most in MOST_ROWS if rows <= most), MOST_ROWS[-1])


def capability_of(device: torch.device) -> Capability:
    """Return an NVIDIA GPU's compute capability, or None for AMD; (9, 0) in the interpreter."""
    if device.type == "cpu":
        return (9, 0)
    return torch.cuda.get_device_capability(device) if is_nvidia(device) else None


def has_small_shared_memory(capability: Capability) -> bool:
    """Return whether a multiprocessor has 100 KiB of shared memory instead of 164 to 228 KiB."""
    return capability is not None and (capability[0] == 12 or capability in {(8, 6), (8, 9)})


def derived_tiling(rows: int, head_size: int, capability: Capability) -> Tiling:
    """Return the tile sizes for a GPU without measurements.

    The more rows a tile has, the more of them share the cost of reading a key, until their
    accumulators no longer fit the registers, as with 256 dims. With Triton 3.9 no size here spills
    on compute capability 8.0 to 12.0. Four warps with 64 keys, or with 64 dims in a quarter, make
    Triton use warp-group instructions. On 9.0 they are `wgmma`, which needs its second operand in
    shared memory. On 10.0 and 11.0 they use tensor memory, with thousands of moves to and from it.

    Args:
        rows: Largest number of new tokens of a request, times query heads of a KV head.
        head_size: D.
        capability: None for AMD, whose smallest products have 16 rows.
    """
    small_shared = has_small_shared_memory(capability)
    if head_size > 256:
        # With two warps, with 64 keys or with 32 rows the loop spills. Two buffers are 50 KiB.
        return Tiling(16, 32, 4, 3 if small_shared or capability is None else 5, 2)
    large = head_size > 128
    if rows <= 8 and capability is not None:
        # Two buffers of 64 keys are 27 KiB for 128 dims, and 51 KiB for 256.
        if large and small_shared:
            return Tiling(8, 32, 2, 5, 3)
        return Tiling(8, 64, 2, 5, 3 if small_shared or (large and capability < (9, 0)) else 4)
    stages = 3 if capability is None else 5
    if large and rows > 16 and capability is not None and capability[0] not in {10, 11}:
        # Two tiles of 16 rows would read the keys twice. On 9.0 Triton uses `wgmma` for the values.
        return Tiling(32, 32, 4, stages, 2)
    if rows <= 16 or large:
        # Two buffers of 64 keys and 256 dims leave too few registers.
        keys = 32 if large and capability is not None else 64
        return Tiling(16, keys, 2, stages, 3 if small_shared else 4)
    return Tiling(32, 32, 2, stages) if rows <= 32 else Tiling(64, 32, 4, 2, 2)


def tiling_for(rows: int, head_size: int, capability: Capability) -> Tiling:
    """Return the tile sizes measured for a GPU, or `derived_tiling` if there are none."""
    key = (capability, triton.next_power_of_2(head_size), row_class(rows))
    return MEASURED.get(key) or derived_tiling(rows, head_size, capability)


def origin(capability: Capability) -> str:
    """Return 'measured' if the table has rows for a compute capability, otherwise 'derived'."""
    return "measured" if any(key[0] == capability for key in MEASURED) else "derived"
