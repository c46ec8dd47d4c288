# SPDX-License-Identifier: Apache-2.0
"""A compiled kernel that is ready to run."""

from __future__ import annotations

from typing import Any

import numpy as np

from testing.ptx.decode import Decoder
from testing.ptx.machine import Block, Machine
from testing.ptx.memory import GlobalMemory, SharedMemory
from testing.ptx.parser import parse

_SCALARS = {"f32": np.float32, "u32": np.uint32, "u64": np.uint64, "f64": np.float64}


class Program:
    """A compiled kernel, ready to run.

    Args:
        ptx: Its text.
        warps: Warps of a program.
        shared_bytes: Dynamic shared memory of a program.
    """

    def __init__(self, ptx: str, warps: int, shared_bytes: int) -> None:
        self.kernel = parse(ptx)
        self.warps = warps
        # Shared memory is aligned no better than the kernel declares. But operands of `wgmma` need
        # 1024 bytes, where dynamic shared memory starts on a GPU.
        self.base = 1024 if "wgmma" in ptx or "tcgen05" in ptx else self.kernel.alignment
        self.shared_bytes = self.kernel.static_bytes + shared_bytes
        symbols = {name: self.base + start for name, start in self.kernel.shared.items()}
        decoder = Decoder(self.kernel, symbols)
        self.blocks: dict[int, Block] = decoder.blocks()
        self.granule = decoder.smallest_shared_access()

    def run(
        self,
        grid: tuple[int, int, int],
        arguments: list[Any],
        memory: GlobalMemory,
        *,
        seed: int = 0,
        together: int = 64,
    ) -> None:
        """Run all programs of a grid.

        Args:
            arguments: Numbers and addresses, one for each parameter.
            seed: Decides the order of programs, and that of the warps of a program between two
                barriers. With 0 all warps of a program run together.
            together: Programs that run together.
        """
        special: dict[str, Any] = {
            f"%nctaid.{axis}": np.full((1, 1), size, np.uint32)
            for axis, size in zip("xyz", grid, strict=True)
        }
        special["%ntid.x"] = np.full((1, 1), 32 * self.warps, np.uint32)
        for (name, kind), value in zip(self.kernel.parameters, arguments, strict=True):
            dtype = _SCALARS[kind]
            if kind[0] == "u":
                value = value & (1 << int(kind[1:])) - 1
            special[name] = np.full((1, 1), value, dtype)
        generator = np.random.default_rng(seed)
        x, y, z = grid
        order = generator.permutation(x * y * z)
        for start in range(0, len(order), together):
            numbers = order[start : start + together]
            programs = np.stack([numbers % x, numbers // x % y, numbers // (x * y)], axis=1)
            ranks = np.zeros((len(numbers), self.warps), np.int64)
            if seed:
                ranks += np.arange(self.warps)
                ranks = generator.permuted(ranks, axis=1)
            shared = SharedMemory(len(numbers), self.shared_bytes, self.granule, self.base)
            Machine(
                self.blocks, programs, numbers, self.warps, special, memory, shared,
                ranks.reshape(-1, 1),
            ).run()  # fmt: skip
        memory.finish_launch()
