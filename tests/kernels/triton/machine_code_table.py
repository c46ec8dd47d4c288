# SPDX-License-Identifier: Apache-2.0
"""Print what decode takes on each GPU, ours beside stock's: `python .../machine_code_table.py`."""

from __future__ import annotations

import triton

from testing.triton.compiling import Attention, Figures, StockDecode, figures
from testing.triton.processes import Compiler

CAPABILITIES = (80, 86, 89, 90, 100, 120)
HEAD_SIZES = (128, 256)

COLUMNS = (
    "compute capability", "D", "kernel", "instructions a byte", "registers", "spills",
    "shared bytes", "tensor-core instructions", "bytes in 16-byte loads",
)  # fmt: skip


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def row_of(name: str, job: Attention | StockDecode, found: Figures) -> str:
    return row(
        f"{job.capability / 10:.1f}", job.head_size, name, f"{found.issued_per_byte:.3f}",
        found.registers, found.spills, found.shared_bytes, found.tensor_core,
        f"{found.wide:.0%}",
    )  # fmt: skip


def main() -> None:
    compiler = Compiler()
    jobs: list[tuple[str, Attention | StockDecode]] = [
        (name, kernel(capability, head_size))
        for capability in CAPABILITIES
        for head_size in HEAD_SIZES
        for name, kernel in (("ours", Attention), ("stock", StockDecode))
    ]
    for _, job in jobs:
        compiler.start(job)
    print(f"Triton {triton.__version__}\n")
    print(row(*COLUMNS))
    print(row(*("---" for _ in COLUMNS)))
    for name, job in jobs:
        print(row_of(name, job, figures(job, compiler(job))), flush=True)
    compiler.close()


if __name__ == "__main__":
    main()
