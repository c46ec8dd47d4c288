# SPDX-License-Identifier: Apache-2.0
"""Predict the decode speed of the attention kernel on any GPU, without having it.

    python -m benchmarks.gpu.predictions [--checkout PATH] [--plan rounded-up]

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
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks.gpu.shapes import HEADS, Heads, Job, Shape, decode_lengths
from benchmarks.markdown import table
from testing.triton import performance_model as model
from testing.triton.machine_code import MachineCode, read_machine_code
from vllm_hybrid_kv.kernels.k8v4 import slot_bytes
from vllm_hybrid_kv.kernels.triton.plan import ROW_TILE_COST
from vllm_hybrid_kv.kernels.triton.tuning import row_class

# Runs in the checkout, whose compiler of kernels has kept its interface since page format 1.
_COMPILE = """
import pickle, sys
from testing.triton.compiling import PAGE, compile_attention
from testing.triton.machine_code import cuda
from vllm_hybrid_kv.kernels.triton.tuning import Tiling, tiling_for
file, capability, head_size, rows, *sizes = sys.argv[1:]
capability, head_size = int(capability), int(head_size)
tiling = tiling_for(int(rows), head_size, divmod(capability, 10))
if sizes:
    tiling = Tiling(*map(int, sizes))
code = compile_attention(cuda(capability), tiling, head_size, PAGE)
metadata = {"shared": code.metadata.shared, "num_warps": code.metadata.num_warps}
asm = {name: code.asm[name] for name in ("cubin", "ptx")}
with open(file, "wb") as to:
    pickle.dump((asm, metadata, vars(tiling)), to)
"""

BATCHES = (8, 16, 32, 64)
LAUNCH_COLUMNS = ("GPU", "heads", "batch", "programs", "waves", "us", "of copy bandwidth")


class Work(NamedTuple):
    """The key tiles and row tiles of each program of a KV head, and the partial results."""

    pieces: list[tuple[int, int]]
    parts: int


Plan = Callable[[Sequence[int], float, int], Work]
"""Takes the key tiles of each request, the programs for each KV head, and the fewest key tiles of
a program."""


def rounded_up(tiles: Sequence[int], programs: float, least: int) -> Work:
    """Divide each request's tiles by its share of the programs, rounded up.

    Kernels did so before equal pieces.
    """
    work = Work([], 0)
    for count in tiles:
        share = math.ceil(count * math.ceil(programs) / sum(tiles))
        splits = min(share, math.ceil(count / least))
        bounds = [count * i // splits for i in range(splits + 1)]
        work.pieces.extend((b - a, 1) for a, b in itertools.pairwise(bounds))
    return work._replace(parts=len(work.pieces))


def equal_pieces(tiles: Sequence[int], programs: float, least: int) -> Work:
    """Cut the list of all tiles into equal pieces, as `plan_kernel` does."""
    cost = ROW_TILE_COST.value
    ends = list(itertools.accumulate(count + cost for count in tiles))
    count = min(int(programs), max(len(tiles), math.ceil(ends[-1] / (cost + least))))
    bounds = [ends[-1] * i // count for i in range(count + 1)]
    pieces, parts = [], 0
    for first, end in itertools.pairwise(bounds):
        found = [
            (min(end, row_end) - max(first, row_end - keys), keys)
            for row_end, keys in zip(ends, tiles, strict=True)
            if row_end > first and row_end - keys < end
        ]
        pieces.append((sum(part for part, _ in found), len(found)))
        parts += sum(part < keys for part, keys in found)
    return Work(pieces, parts)


PLANS: dict[str, Plan] = {"equal-pieces": equal_pieces, "rounded-up": rounded_up}


def compiled(
    checkout: Path, capability: int, head_size: int, rows: int, sizes: Sequence[str]
) -> tuple[MachineCode, dict[str, Any]]:
    """Return the machine code and the tiling of a checkout's kernel for a number of rows."""
    paths = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run(
            [sys.executable, "-c", _COMPILE, file.name, str(capability), str(head_size),
             str(rows), *sizes],
            cwd=checkout, check=True,
            env=os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0"},
        )  # fmt: skip
        asm, metadata, tiling = pickle.load(file)
    result = SimpleNamespace(asm=asm, metadata=SimpleNamespace(**metadata))
    return read_machine_code(result), tiling


def predict(
    gpu: model.Gpu, shape: Shape, code: MachineCode, tiling: dict[str, Any], resident: int,
    plan: Plan,
) -> model.Launch:  # fmt: skip
    """Predict attention to a batch in which all requests have equally many new tokens."""
    heads = shape.heads
    rows = shape.most_new * heads.query // heads.kv
    row_tiles = math.ceil(rows / tiling["block_m"])
    tiles = [math.ceil(one / tiling["block_n"]) for one in shape.lengths for _ in range(row_tiles)]
    target = tiling["programs_per_processor"] * gpu.processors / heads.kv
    work = plan(tiles, target, tiling["min_split_tiles"])
    partial = work.parts * heads.kv * min(tiling["block_m"], rows) * (heads.size + 1) * 4
    tile_bytes = tiling["block_n"] * slot_bytes(heads.size)
    return model.predict(code, gpu, work.pieces * heads.kv, tile_bytes, partial, resident)


PREDICTED_SECTIONS = ("decode", "verify")


def predict_jobs(device: str, jobs: Sequence[Job]) -> dict[str, float | str]:
    """Predict the jobs in `PREDICTED_SECTIONS` on a device such as "NVIDIA H200".

    Returns:
        By the text of the job: the milliseconds, or the reason why there are none.
    """
    gpu = next((one for name, one in model.GPUS.items() if name in device), None)
    kernel = cache(partial(compiled, Path(__file__).parents[2]))
    found: dict[str, float | str] = {}
    for job in jobs:
        heads, rows = job.shape.heads, job.shape.most_new * job.shape.heads.query
        if job.section not in PREDICTED_SECTIONS:
            found[str(job)] = f"the model predicts only {' and '.join(PREDICTED_SECTIONS)}"
            continue
        if gpu is None:
            found[str(job)] = f"the model does not know {device}"
            continue
        try:
            # All numbers of rows of a class have the same kernel.
            code, tiling = kernel(gpu.capability, heads.size, row_class(rows // heads.kv), ())
            resident = model.resident_programs(code, gpu)
            launch = predict(gpu, job.shape, code, tiling, resident, equal_pieces)
            found[str(job)] = 1e3 * launch.seconds
        # The model refuses instructions that it does not know.
        except (ValueError, subprocess.CalledProcessError) as error:
            found[str(job)] = str(error)
    return found


def predicted(
    gpu: model.Gpu, heads: Heads, code: MachineCode, tiling: dict[str, Any], resident: int,
    plan: Plan, tokens: int,
) -> list[list[str]]:  # fmt: skip
    """Return one row of a table for each batch."""
    rows = []
    for ragged, batch in itertools.product((False, True), BATCHES):
        shape = Shape(heads, decode_lengths(batch, ragged=ragged), (tokens,) * batch)
        launch = predict(gpu, shape, code, tiling, resident, plan)
        tiles = sum(math.ceil(one / tiling["block_n"]) for one in shape.lengths)
        copied = tiles * heads.kv * tiling["block_n"] * slot_bytes(heads.size)
        copy_seconds = copied / (model.COPY_SHARE * gpu.bandwidth)
        rows.append([
            gpu.name, f"{heads.query}/{heads.kv} x {heads.size}",
            f"{batch}, {'ragged' if ragged else 'equal'}",
            f"{launch.programs} of {resident * gpu.processors}", str(launch.waves),
            f"{1e6 * launch.seconds:.0f}", f"{100 * copy_seconds / launch.seconds:.0f} %",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkout", type=Path, default=Path.cwd())
    parser.add_argument("--plan", choices=PLANS, default="equal-pieces")
    parser.add_argument("--tokens", type=int, default=1, help="new tokens of each request")
    parser.add_argument("--tiling", default="", help="block_m x block_n x warps x stages")
    parser.add_argument("--resident", type=int, help="programs of a multiprocessor")
    parser.add_argument("--gpu", action="append", choices=model.GPUS)
    args = parser.parse_args()
    kernels: list[list[str]] = []
    launches: list[list[str]] = []
    for name, heads in itertools.product(args.gpu or model.GPUS, HEADS):
        gpu = model.GPUS[name]
        sizes = args.tiling.split("x") if args.tiling else []
        rows = args.tokens * heads.query // heads.kv
        code, tiling = compiled(args.checkout, gpu.capability, heads.size, rows, sizes)
        resident = args.resident or model.resident_programs(code, gpu)
        tile_bytes = tiling["block_n"] * slot_bytes(heads.size)
        share = model.read_bytes_per_cycle(gpu) / gpu.processors
        try:
            alone = model.pace(code, gpu, 1, tile_bytes, share)
        except ValueError as error:
            print(f"{name}, {heads}: {error}", file=sys.stderr)
            continue
        full = model.pace(code, gpu, resident, tile_bytes, share)
        kernels.append([
            name, str(heads.size), str(code.registers), str(code.shared_bytes), str(resident),
            str(code.loop_length), str(code.barriers), f"{alone.cycles:.0f}",
            f"{full.cycles:.0f}", f"{resident * tile_bytes / share:.0f}",
            f"{full.bytes_in_flight / 1024:.0f}", f"{share * model.MEMORY_LATENCY / 1024:.0f}",
        ])  # fmt: skip
        launches += predicted(gpu, heads, code, tiling, resident, PLANS[args.plan], args.tokens)
    columns = (
        "GPU", "D", "registers", "shared bytes", "programs", "loop", "barriers",
        "cycles, alone", "cycles, full", "of memory", "KiB in flight", "needed",
    )  # fmt: skip
    print(*table(columns, kernels), "", sep="\n")
    print(*table(LAUNCH_COLUMNS, launches), sep="\n")


if __name__ == "__main__":
    main()
