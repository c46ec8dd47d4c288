# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for any GPU without having it, and read the machine code.

Triton ships `ptxas`, `cuobjdump` and `nvdisasm`, so registers, spills, the width of every load and
the instructions of the main loop are known without a GPU. Speed is not. But a loop that issues
more instructions a byte than a GPU can, in the time in which memory delivers the byte, cannot
reach the memory bandwidth.
"""

from __future__ import annotations

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
    """Return why machine code cannot be read here, or None if it can."""
    for tool in ("ptxas", "cuobjdump", "nvdisasm"):
        if not (_TOOLS / tool).exists():
            return f"this Triton ({triton.__version__}) has no {tool}"
    return None


def cuda(capability: int) -> GPUTarget:
    """Return the target of a compute capability, 90 for 9.0."""
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
    """Compile a kernel for a target as a launch with such arguments would.

    Args:
        kernel: The result of `triton.jit`, in a process in which Triton does not interpret.
        target: The GPU.
        types: Triton's type names of the arguments, such as `*u8` or `i32`.
        constants: Values of the other arguments.
        divisible: Arguments that are multiples of 16, pointers included; a launch detects them.
            Without them no load is wider than one element.
        num_warps: As at the launch.
        num_stages: As at the launch.
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
class MachineCode:
    """The resources and instructions of a compiled kernel.

    Attributes:
        registers: Of a thread.
        stack_bytes: Of a thread.
        spill_bytes: Of a thread, in local memory.
        shared_bytes: Of a program, as requested at the launch.
        operations: Names of the instructions, without predicates.
        loops: First and last instruction of each loop.
        num_warps: Warps of a program.
        ptx: The PTX that it was made from.
    """

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int
    operations: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]
    num_warps: int
    ptx: str

    def counts(self, loop: tuple[int, int] | None = None) -> Counter[str]:
        """Count the instructions of each class of `_CLASSES`, in a loop or in all."""
        first, last = loop or (0, len(self.operations) - 1)
        return Counter(
            next(name for name, pattern in _CLASSES if pattern.match(operation))
            for operation in self.operations[first : last + 1]
        )

    def main_loop(self) -> tuple[int, int]:
        """Return the shortest of the loops with the most bytes loaded."""

        def loaded(loop: tuple[int, int]) -> int:
            counts = self.counts(loop)
            return sum(size * counts[f"load {size}"] for size in (1, 2, 4, 8, 16))

        return max(self.loops, key=lambda loop: (loaded(loop), loop[0] - loop[1]))

    def issued_per_byte(self, bytes_per_iteration: float) -> float:
        """Return the instructions that a program's warps issue for a byte in the main loop."""
        first, last = self.main_loop()
        return (last - first + 1) * self.num_warps / bytes_per_iteration


_INT8_PRODUCT = re.compile(
    r"mma\.sync\.\S+\.s32\.s8\.s8\.s32\s+\{[^}]*\},\s*\{([^}]*)\},\s*\{([^}]*)\}"
)
_FROM_SHARED_MEMORY = re.compile(r"ldmatrix\.\S+\s+\{([^}]*)\}")


def int8_operands(ptx: str) -> tuple[list[set[str]], set[str]]:
    """Return the registers of both operands of each int8 product, and those loaded by `ldmatrix`.

    PTX assigns a register once, so an operand that `ldmatrix` loads is not converted.
    """

    def registers(text: str) -> set[str]:
        return set(re.findall(r"%\w+", text))

    products = [registers(a) | registers(b) for a, b in _INT8_PRODUCT.findall(ptx)]
    return products, registers(" ".join(_FROM_SHARED_MEMORY.findall(ptx)))


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def read_machine_code(compiled: Any) -> MachineCode:
    """Return the machine code of a kernel compiled by `compile_kernel` for an NVIDIA GPU.

    Raises:
        subprocess.CalledProcessError: A tool does not know the GPU.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    resources = {name: int(size) for name, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    operations: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(operations)
        if instruction := _INSTRUCTION.match(line):
            target = _TARGET.search(instruction[2])
            if instruction[1].startswith("BRA") and target:
                branches.append((len(operations), target[1]))
            operations.append(instruction[1])
    # `<` also excludes the trap after the last instruction, which jumps to itself.
    loops = tuple((labels[label], at) for at, label in branches if labels.get(label, at) < at)
    return MachineCode(
        resources["REG"],
        resources["STACK"],
        resources["LOCAL"],
        int(compiled.metadata.shared),
        tuple(operations),
        loops,
        int(compiled.metadata.num_warps),
        compiled.asm["ptx"],
    )
