# SPDX-License-Identifier: Apache-2.0
"""What the machine does not know it refuses, with the line and the opcode."""

from __future__ import annotations

import pytest

from testing.ptx.errors import UnknownInstruction
from testing.ptx.parser import Address, Group, Immediate, Register, Symbol, parse
from tests.kernels.ptx.snippets import HEAD, run

UNKNOWN = [
    "add.sat.s32 %r1, %r900, 1;",
    "add.rz.f32 %r1, 0f3F800000, 0f3F800000;",
    "atom.global.add.u32 %r1, [%rd0], 1;",
    "bar.sync 1;",
    "bar.sync 0, 32;",
    "brev.b32 %r1, %r900;",
    "cp.async.bulk.commit_group;",
    "cvt.rz.f16.f32 %rs1, 0f3F800000;",
    "ex2.approx.f16 %rs1, %rs2;",
    "ld.global.v8.b32 {%r1}, [%rd0];",
    "ld.local.b32 %r1, [%rd0];",
    "ld.shared.v2.b32 %r1, [smem];",
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};",
    "mov.u32 %r1, %clock;",
    "mov.b32 %r1, nowhere;",
    "ret.uni;",
    "setp.lt.and.s32 %p1, %r900, 1, %p2;",
    "shfl.sync.bfly.b32 %r1|%p1, %r900, 1, 31, -1;",
    "tcgen05.shift.cta_group::1.down [%r1];",
    "tanh.approx.f32 %r1, 0f3F800000;",
]


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_unknown_instructions_are_refused_with_their_line(instruction: str) -> None:
    opcode = instruction.split()[0].rstrip(";")
    line = HEAD.format(parameters="", threads=32).count("\n") + 2
    with pytest.raises(Exception, match=f"line {line}.*{opcode}") as refused:
        run(instruction)
    # A special register is refused when it is read.
    assert isinstance(refused.value, UnknownInstruction) or "%clock" in instruction


@pytest.mark.parametrize(
    "directive", [".callprototype", ".local .b8 depot[8];", ".branchtargets a;"]
)
def test_unknown_directives_are_refused(directive: str) -> None:
    with pytest.raises(UnknownInstruction):
        run(directive)


def test_operands_labels_scopes_and_guards_are_parsed() -> None:
    kernel = parse(
        HEAD.format(parameters=".param .u64 .ptr .global .align 1 snippet_param_0", threads=64)
        + """
        @!%p1 bra $L__1; // comment
        { .reg .b32 t; shr.u32 t, %r1, 8;
        and.b32 %r2, t, 0x000f000f; }
        ld.global.v2.b32 { %r3, %r4 }, [ %rd0 + -8 ];
        $L__1:
        mov.b32 %r5, 0f3F800000;
        mov.b32 {_, %rs1}, %r5;
        prmt.b32 %r6, %r1, %r2,
            0x5410U;
        ret;
        }
        """
    )
    assert kernel.parameters == [("snippet_param_0", "u64")]
    assert kernel.threads == 64
    branch, shift, mask, load, one, unpack, permute, _ = kernel.instructions[3:]
    assert (branch.guard, branch.negated) == ("%p1", True)
    assert branch.operands == (Symbol("$L__1"),)
    assert kernel.labels["$L__1"] == kernel.instructions.index(one)
    (scoped, *_), (_, again, number) = shift.operands, mask.operands
    assert scoped == again != Register("t")
    assert kernel.type_of(scoped.name) == "b32"
    assert number == Immediate(0x000F000F)
    assert load.operands == (Group((Register("%r3"), Register("%r4"))), Address("%rd0", -8))
    assert one.operands[1] == Immediate(0x3F800000, bits=True)
    assert unpack.operands[0] == Group((Register("_"), Register("%rs1")))
    assert permute.operands[3] == Immediate(0x5410)
    assert permute.line == kernel.instructions[-1].line - 2


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("add.s64 %rd5, %rd0, %r900;", "add.s64 %rd5, %rd0, 1;"),
        ("add.s32 %rd5, %r900, 1;", "add.s32 %r5, %r900, 1;"),
        ("add.f32 %r5, %r900, 1;", "add.f32 %r5, %r900, 0f3F800000;"),
        ("ld.param.b32 %r5, [snippet_param_0];", "ld.param.b64 %rd5, [snippet_param_0];"),
    ],
)
def test_operands_of_another_size_are_refused(wrong: str, right: str) -> None:
    import numpy as np

    array = np.zeros(8, np.uint32)
    run(right, array)
    with pytest.raises(UnknownInstruction):
        run(wrong, array)
