# SPDX-License-Identifier: Apache-2.0
"""Compile kernels for any GPU without having it, and read the machine code.

Triton ships `ptxas`, `cuobjdump` and `nvdisasm`, so registers, spills, the width of every load and
the instructions of the main loop are known without a GPU. Speed is not, but there is a bound: if a
loop needs more instructions per byte than the GPU can issue while memory delivers the byte, it
cannot reach the memory bandwidth.
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
class MachineCode:
    """The resources and instructions of a compiled kernel.

    Attributes:
        registers: Per thread.
        stack_bytes: Per thread.
        spill_bytes: Local memory per thread, which holds spilled registers.
        shared_bytes: Shared memory per program, as the launch requests it.
        operations: Names of the instructions, without predicates.
        loops: The indices in `operations` of each loop's first and last instruction.
        num_warps: Warps per program.
        ptx: The PTX from which the machine code was made.
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
        """Return the loop that loads the most bytes; the shortest if several load as many."""

        def loaded(loop: tuple[int, int]) -> int:
            counts = self.counts(loop)
            return sum(size * counts[f"load {size}"] for size in (1, 2, 4, 8, 16))

        return max(self.loops, key=lambda loop: (loaded(loop), loop[0] - loop[1]))

    def issued_per_byte(self, bytes_per_iteration: float) -> float:
        """Return how many instructions a program's warps issue per byte in the main loop."""
        first, last = self.main_loop()
        return (last - first + 1) * self.num_warps / bytes_per_iteration


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
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def read_machine_code(compiled: Any) -> MachineCode:
    """Disassemble a kernel that `compile_kernel` compiled for an NVIDIA GPU.

    Raises:
        subprocess.CalledProcessError: `cuobjdump` or `nvdisasm` does not support the GPU.
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
    # `<` keeps branches back, but not the branch to itself that follows the last instruction.
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
