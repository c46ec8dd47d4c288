# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu.shapes import DEFAULT_PARTS, PARTS


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Check the GPU kernels on this GPU and measure them against other kernels.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the files")
    parser.add_argument("--part", action="append", choices=PARTS, help="one part; may be repeated "
                        f"(default: {', '.join(DEFAULT_PARTS)})")  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="time limit of the chosen parts together, compiling not counted "
                        "(default: the sum of their limits)")  # fmt: skip
    parser.add_argument("--report", action="store_true",
                        help="write only the report, from the files of earlier runs")  # fmt: skip
    parser.add_argument("--rehearse", action="store_true",
                        help="run tiny sizes in Triton's interpreter, without a GPU")  # fmt: skip
    parser.add_argument("--tune", action="store_true",
                        help="find the fastest tile sizes for this GPU instead")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.budget is None:
        chosen = arguments.part or DEFAULT_PARTS
        arguments.budget = sum(PARTS[name].seconds for name in chosen)
    return arguments


def main() -> int:
    """Run the command and return its exit status."""
    arguments = _arguments()
    if arguments.rehearse:
        # Triton reads this when it is imported, so import nothing of it earlier.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["VLLM_HYBRID_KV_CPU_ISA"] = "interpreter"
    from benchmarks.gpu import report, run

    if arguments.report:
        print(report.write_summary(arguments.out))
        return 0
    return run.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
