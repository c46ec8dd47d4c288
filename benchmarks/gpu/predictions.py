# SPDX-License-Identifier: Apache-2.0
"""Predict the decode speed of the attention kernel on GPUs that are not at hand.

    python -m benchmarks.gpu.predictions [--checkout PATH] [--tiling 8x64x2x5] [--resident 5]

Compiles the kernels of a checkout, this one or an older one, and prints what
`testing.triton.performance_model` predicts for them. Nothing is measured.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu.shapes import Heads
from benchmarks.markdown import table
from testing.triton import performance_model as model
from testing.triton.machine_code import MachineCode, read_machine_code
from vllm_hybrid_kv.kernels.k8v4 import slot_bytes

# Runs in the checkout, whose compiler of kernels has kept its interface since page format 1.
_COMPILE = """
import pickle, sys
from testing.triton.compiling import GROUP, PAGE, compile_attention
from testing.triton.machine_code import cuda
from vllm_hybrid_kv.kernels.triton.tuning import Tiling, tiling_for
file, capability, head_size, *sizes = sys.argv[1:]
capability, head_size = int(capability), int(head_size)
tiling = tiling_for(GROUP, head_size, divmod(capability, 10))
if sizes:
    tiling = Tiling(*map(int, sizes))
code = compile_attention(cuda(capability), tiling, head_size, PAGE)
metadata = {"shared": code.metadata.shared, "num_warps": code.metadata.num_warps}
asm = {name: code.asm[name] for name in ("cubin", "ptx")}
with open(file, "wb") as to:
    pickle.dump((asm, metadata, vars(tiling)), to)
"""

HEADS = (Heads(32, 8, 128), Heads(16, 2, 256))
BATCHES = (8, 16, 32, 64)
LENGTH = 32768

Plan = Callable[[Sequence[int], int, dict[str, Any]], list[int]]
"""Returns the key tiles of each program of a KV head. Takes the key tiles of each request, the
programs that a KV head gets, and the tiling."""


def lengths(batch: int, *, ragged: bool) -> list[int]:
    """Return the tokens of each request: all equal, or from 64k down to 1k in equal ratios."""
    if not ragged:
        return [LENGTH] * batch
    return [int(65536 * 64 ** (-i / (batch - 1))) for i in range(batch)]


def rounded_up(tiles: Sequence[int], programs: int, tiling: dict[str, Any]) -> list[int]:
    """Divide each request's tiles by its share of the programs, rounded up."""
    divided = []
    for count in tiles:
        fewest = math.ceil(count / tiling["min_split_tiles"])
        splits = min(math.ceil(count * programs / sum(tiles)), fewest)
        divided += [count * (i + 1) // splits - count * i // splits for i in range(splits)]
    return divided


def compiled(
    checkout: Path, capability: int, head_size: int, sizes: Sequence[str]
) -> tuple[MachineCode, dict[str, Any]]:
    """Return the machine code and the tiling of a checkout's decode kernel."""
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run(
            [sys.executable, "-c", _COMPILE, file.name, str(capability), str(head_size), *sizes],
            cwd=checkout, check=True, env=os.environ | {"PYTHONPATH": str(checkout)},
        )  # fmt: skip
        asm, metadata, tiling = pickle.load(file)
    result = SimpleNamespace(asm=asm, metadata=SimpleNamespace(**metadata))
    return read_machine_code(result), tiling


def predicted(
    gpu: model.Gpu, heads: Heads, code: MachineCode, tiling: dict[str, Any], resident: int,
    plan: Plan,
) -> list[list[str]]:  # fmt: skip
    """Return one row of a table for each batch."""
    tile_bytes = tiling["block_n"] * slot_bytes(heads.size)
    target = math.ceil(tiling["programs_per_processor"] * gpu.processors / heads.kv)
    rows = []
    for ragged, batch in itertools.product((False, True), BATCHES):
        tiles = [math.ceil(one / tiling["block_n"]) for one in lengths(batch, ragged=ragged)]
        programs = plan(tiles, target, tiling) * heads.kv
        partial = len(programs) * tiling["block_m"] * (heads.size + 1) * 4
        launch = model.predict(code, gpu, programs, tile_bytes, partial, resident)
        rows.append([
            gpu.name, f"{heads.query}/{heads.kv} x {heads.size}",
            f"{batch}, {'ragged' if ragged else 'equal'}",
            f"{launch.programs} of {resident * gpu.processors}", str(launch.waves),
            f"{1e6 * launch.seconds:.0f}", f"{100 * launch.copy_share:.0f} %",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkout", type=Path, default=Path.cwd())
    parser.add_argument("--tiling", default="", help="block_m x block_n x warps x stages")
    parser.add_argument("--resident", type=int, help="programs of a multiprocessor")
    parser.add_argument("--gpu", action="append", choices=model.GPUS)
    args = parser.parse_args()
    kernels: list[list[str]] = []
    launches: list[list[str]] = []
    for name, heads in itertools.product(args.gpu or model.GPUS, HEADS):
        gpu = model.GPUS[name]
        sizes = args.tiling.split("x") if args.tiling else []
        code, tiling = compiled(args.checkout, gpu.capability, heads.size, sizes)
        resident = args.resident or model.resident_programs(code, gpu)
        tile_bytes = tiling["block_n"] * slot_bytes(heads.size)
        share = model.read_bytes_per_cycle(gpu) / gpu.processors
        alone = model.pace(code, gpu, 1, tile_bytes, share)
        full = model.pace(code, gpu, resident, tile_bytes, share)
        kernels.append([
            name, str(heads.size), str(code.registers), str(code.shared_bytes), str(resident),
            str(code.loop_length), str(code.barriers), f"{alone.cycles:.0f}",
            f"{full.cycles:.0f}", f"{resident * tile_bytes / share:.0f}",
            f"{full.bytes_in_flight / 1024:.0f}", f"{share * model.MEMORY_LATENCY / 1024:.0f}",
        ])  # fmt: skip
        launches += predicted(gpu, heads, code, tiling, resident, rounded_up)
    columns = (
        "GPU", "D", "registers", "shared bytes", "programs", "loop", "barriers",
        "cycles, alone", "cycles, full", "of memory", "KiB in flight", "needed",
    )  # fmt: skip
    print(*table(columns, kernels), "", sep="\n")
    columns = ("GPU", "heads", "batch", "programs", "waves", "us", "of copy bandwidth")
    print(*table(columns, launches), sep="\n")


if __name__ == "__main__":
    main()
