# SPDX-License-Identifier: Apache-2.0
"""Short pieces of PTX, run on numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from testing.ptx.memory import GlobalMemory
from testing.ptx.program import Program

HEAD = """
.version 8.8
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry snippet({parameters})
.reqntid {threads}
{{
.reg .pred %p<99>; .reg .b16 %rs<99>; .reg .b32 %r<999>; .reg .b64 %rd<99>;
mov.u32 %r900, %tid.x;
mov.u32 %r901, %ctaid.x;
mad.lo.s32 %r902, %r901, {threads}, %r900;
"""
"""Before a piece: %r900 is the lane in its program, %r902 in the grid, and %rd<i> parameter i."""

PREFIXES = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}


def run(
    body: str,
    *arrays: np.ndarray,
    warps: int = 1,
    programs: int = 1,
    shared: int = 1024,
    seed: int = 0,
    registers: Sequence[int] = (),
) -> None:
    """Run a piece of PTX; `%rd<i>` is the address of the i-th array, which it may change.

    Args:
        registers: Numbers that `%r<i>` hold, from 800 on.
    """
    memory = GlobalMemory()
    lines = []
    for i, array in enumerate(arrays):
        memory.register(array.reshape(-1).view(np.uint8), array.ctypes.data)
        lines.append(f"ld.param.b64 %rd{i}, [snippet_param_{i}];")
    for i, value in enumerate(registers, 800):
        lines.append(f"mov.b32 %r{i}, {value};")
    parameters = ", ".join(f".param .u64 snippet_param_{i}" for i in range(len(arrays)))
    text = HEAD.format(parameters=parameters, threads=32 * warps)
    text += "\n".join(lines) + "\n" + body + "\nret;\n}\n"
    addresses = [array.ctypes.data for array in arrays]
    Program(text, warps, shared).run((programs, 1, 1), addresses, memory, seed=seed)


def each_lane(
    opcode: str, result: np.dtype, sources: Sequence[np.ndarray], immediates: Sequence[int] = ()
) -> np.ndarray:
    """Run an instruction in which each lane has one element of every array. Returns the results.

    Arrays of booleans are predicates. `result` is the type of the results.
    """
    count = len(sources[0])
    assert count % 32 == 0
    lines, operands = [], []
    stored = [source.astype(np.uint16) if source.dtype == bool else source for source in sources]
    for i, source in enumerate(stored):
        size = source.itemsize
        name = f"{PREFIXES[size]}{10 + i}"
        lines.append(f"mad.wide.u32 %rd{40 + i}, %r902, {size}, %rd{i};")
        lines.append(f"ld.global.b{8 * size} {name}, [%rd{40 + i}];")
        if sources[i].dtype == bool:
            lines.append(f"setp.ne.b16 %p{10 + i}, {name}, 0;")
            name = f"%p{10 + i}"
        operands.append(name)
    predicate = result == np.dtype(bool)
    out = np.zeros(count, np.uint16 if predicate else result)
    size = out.itemsize
    name = f"{PREFIXES[size]}30"
    target = "%p30" if predicate else name
    lines.append(f"{opcode} {', '.join([target, *operands, *map(str, immediates)])};")
    if predicate:
        lines.append(f"selp.b16 {name}, 1, 0, %p30;")
    lines.append(f"mad.wide.u32 %rd60, %r902, {size}, %rd{len(sources)};")
    lines.append(f"st.global.b{8 * size} [%rd60], {name};")
    run("\n".join(lines), *stored, out, programs=count // 32)
    return out.astype(bool) if predicate else out
