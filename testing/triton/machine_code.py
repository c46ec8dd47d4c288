# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for any GPU without having it, and read the machine code.

Triton ships `ptxas`, `cuobjdump` and `nvdisasm`, so registers, spills, the width of every load and
the instructions of the main loop are known without a GPU. Speed is not: `performance_model.py`
predicts it.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def missing_tools() -> str | None:
    """Return why this Triton's machine code cannot be read, or None if it can."""
    for tool in ("ptxas", "cuobjdump", "nvdisasm"):
        if not (_TOOLS / tool).exists():
            return f"this Triton ({triton.__version__}) has no {tool}"
    return None


def cuda(capability: int) -> GPUTarget:
    """Return Triton's target for a compute capability, given as 90 for 9.0."""
    return GPUTarget("cuda", capability, 32)


def compile_kernel(
    kernel: Any,
    target: GPUTarget,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    divisible: Iterable[str],
    num_warps: int = 4,
    num_stages: int = 3,
) -> Any:
    """Compile a kernel for a GPU as a launch with these types and constants would.

    Args:
        kernel: The result of `triton.jit`, in a process in which Triton does not interpret.
        target: The GPU.
        types: Triton's type names of the arguments, such as `*u8` or `i32`.
        constants: Values of the other arguments.
        divisible: The arguments, pointers included, that are multiples of 16. A launch detects
            them. Without them no load is wider than one element.
        num_warps, num_stages: As at the launch.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {name: constants[name] for name in names if signature[name] == "constexpr"}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(divisible)}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=target, options=options)


_CLASSES = (
    ("other", re.compile(r"FFMA|DFMA")),
    ("tensor core", re.compile(r"[HIQU]?[A-Z]*MMA\b")),
    ("load 16", re.compile(r"(LDG|LDGSTS)\b.*\.128")),
    ("load 8", re.compile(r"(LDG|LDGSTS)\b.*\.64")),
    ("load 2", re.compile(r"LDG\b.*\.[US]16")),
    ("load 1", re.compile(r"LDG\b.*\.[US]8")),
    ("load 4", re.compile(r"(LDG|LDGSTS)\b")),
    ("store 16", re.compile(r"STG\b.*\.128")),
    ("store other", re.compile(r"STG\b")),
    ("spill", re.compile(r"(LDL|STL)\b")),
    ("other", re.compile("")),
)


@dataclass(frozen=True)
class Instruction:
    """One instruction, with the control word by which the compiler schedules it.

    A warp has six scoreboards, which count its unfinished instructions.

    Attributes:
        operation: Name with modifiers, such as `LDG.E.128`, without predicate.
        arguments: Operands, as text.
        stall: Cycles until the warp's next instruction may issue.
        written: Scoreboard that holds until the result is written; None without.
        read: Scoreboard that holds until the operands are read; None without.
        awaited: The scoreboards that must be free before it issues.
    """

    operation: str
    arguments: str
    stall: int
    written: int | None
    read: int | None
    awaited: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class MachineCode:
    """The resources and instructions of a compiled kernel.

    Attributes:
        registers: Per thread.
        stack_bytes: Per thread.
        spill_bytes: Local memory per thread, which holds spilled registers.
        shared_bytes: Shared memory per program, as the launch requests it.
        instructions: In order.
        loops: The indices in `instructions` of each loop's first and last instruction.
        num_warps: Warps per program.
        ptx: The PTX from which the machine code was made.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    instructions: tuple[Instruction, ...]
    loops: tuple[tuple[int, int], ...]
    num_warps: int
    ptx: str

    @property
    def operations(self) -> tuple[str, ...]:
        """The names of the instructions, without predicates."""
        return tuple(one.operation for one in self.instructions)

    def counts(self, loop: tuple[int, int] | None = None) -> Counter[str]:
        """Count the instructions of each class of `_CLASSES`, in a loop or in all."""
        first, last = loop or (0, len(self.operations) - 1)
        return Counter(
            next(name for name, pattern in _CLASSES if pattern.match(operation))
            for operation in self.operations[first : last + 1]
        )

    def main_loop(self) -> tuple[int, int]:
        """Return the innermost loop that loads the most bytes; the shortest of several."""

        def loaded(loop: tuple[int, int]) -> int:
            counts = self.counts(loop)
            return sum(size * counts[f"load {size}"] for size in (1, 2, 4, 8, 16))

        innermost = [
            loop
            for loop in self.loops
            if not any(loop[0] <= a and b <= loop[1] and loop != (a, b) for a, b in self.loops)
        ]
        return max(innermost, key=lambda loop: (loaded(loop), loop[0] - loop[1]))

    @property
    def loop_length(self) -> int:
        """The number of instructions of the main loop."""
        first, last = self.main_loop()
        return last - first + 1

    @property
    def barriers(self) -> int:
        """The number of barriers in the main loop."""
        first, last = self.main_loop()
        return sum(name.startswith("BAR") for name in self.operations[first : last + 1])

    @property
    def pending_copies(self) -> tuple[int, ...]:
        """How many groups of copies may be unfinished after each wait of the main loop."""
        first, last = self.main_loop()
        waits = (one for one in self.instructions[first : last + 1] if one.operation == "DEPBAR.LE")
        return tuple(int(one.arguments.split(",")[1], 16) for one in waits)

    def issued_per_byte(self, bytes_per_iteration: float) -> float:
        """Return how many instructions a program's warps issue per byte in the main loop."""
        return self.loop_length * self.num_warps / bytes_per_iteration


_INT8_PRODUCT = re.compile(
    r"mma\.sync\.\S+\.s32\.s8\.s8\.s32\s+\{[^}]*\},\s*\{([^}]*)\},\s*\{([^}]*)\}"
)
_FROM_SHARED_MEMORY = re.compile(r"ldmatrix\.\S+\s+\{([^}]*)\}")


def int8_operands(ptx: str) -> tuple[list[set[str]], set[str]]:
    """Return each int8 product's operand registers, and all registers that `ldmatrix` loads.

    PTX assigns each register once. So if a product reads what `ldmatrix` loaded, nothing converts
    the codes in between.
    """

    def registers(text: str) -> set[str]:
        return set(re.findall(r"%\w+", text))

    products = [registers(a) | registers(b) for a, b in _INT8_PRODUCT.findall(ptx)]
    return products, registers(" ".join(_FROM_SHARED_MEMORY.findall(ptx)))


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)([^;]*);")
_SECOND_WORD = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/$")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _instruction(operation: str, arguments: str, second_word: str) -> Instruction:
    """Read the control bits, 41 to 57 of the second half of an instruction since Volta."""
    control = int(second_word, 16) >> 41
    written, read = control >> 5 & 7, control >> 8 & 7
    return Instruction(
        operation,
        arguments,
        control & 15,
        None if written == 7 else written,
        None if read == 7 else read,
        tuple(board for board in range(6) if control >> 11 + board & 1),
    )


def read_machine_code(compiled: Any) -> MachineCode:
    """Disassemble a kernel that `compile_kernel` compiled for an NVIDIA GPU.

    Raises:
        subprocess.CalledProcessError: `cuobjdump` or `nvdisasm` does not support the GPU.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", "-hex", file.name)
    resources = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    lines = listing.splitlines()
    for line, following in itertools.pairwise(lines):
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        if (found := _INSTRUCTION.match(line)) and (second := _SECOND_WORD.match(following)):
            target = _TARGET.search(found[2])
            if found[1].startswith("BRA") and target:
                branches.append((len(instructions), target[1]))
            instructions.append(_instruction(found[1], found[2], second[1]))
    # `<` keeps branches back, but not the branch to itself that follows the last instruction.
    loops = tuple((labels[label], at) for at, label in branches if labels.get(label, at) < at)
    return MachineCode(
        resources["REG"],
        resources["STACK"],
        resources["LOCAL"],
        int(compiled.metadata.shared),
        tuple(instructions),
        loops,
        int(compiled.metadata.num_warps),
        compiled.asm["ptx"],
    )
