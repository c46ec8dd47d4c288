# SPDX-License-Identifier: Apache-2.0
"""Parse PTX text, as Triton emits it, into instructions with operands."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from testing.ptx.errors import UnknownInstruction


@dataclass(frozen=True)
class Register:
    """A register, or a special one such as `%tid.x`. The destination `_` drops a result."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A number in an instruction. `bits` says that `value` is the bits of a float."""

    value: int
    bits: bool = False


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; the base is a register, a symbol or absent."""

    base: str | None
    offset: int


@dataclass(frozen=True)
class Symbol:
    """A label or a variable in shared memory."""

    name: str


@dataclass(frozen=True)
class Group:
    """Operands in braces."""

    items: tuple[Operand, ...]


Operand = Register | Immediate | Address | Symbol | Group


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        guard: The predicate register that decides whether a lane executes it, if any.
        negated: Whether lanes with a false predicate execute it.
        used_bytes: Which bytes of a vector load are used, by LLVM's pragma; -1 means all.
    """

    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: str | None = None
    negated: bool = False
    used_bytes: int = -1

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class Kernel:
    """A parsed kernel.

    Attributes:
        parameters: Names and types, such as `("kernel_param_0", "u64")`.
        types: The type of each kind of register by its prefix, such as `{"%r": "b32"}`, and of each
            register that is declared by its name.
        shared: Static shared variables: names to offset. Dynamic shared memory comes after them.
        static_bytes: Bytes of all static shared variables.
        alignment: The largest declared alignment of shared memory.
        labels: The index of the instruction after each label.
        threads: Threads of a program, from `.reqntid`.
        guarded: Registers that guarded instructions write.
    """

    name: str = ""
    parameters: list[tuple[str, str]] = field(default_factory=list)
    types: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    static_bytes: int = 0
    alignment: int = 16
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    threads: int = 0
    guarded: set[str] = field(default_factory=set)

    def type_of(self, register: str) -> str:
        """Return the declared type of a register, such as `b32`."""
        if register in self.types:
            return self.types[register]
        return self.types[register.rstrip("0123456789")]


# Directives that do not change what a kernel computes.
_IGNORED = (
    ".version", ".target", ".address_size", ".loc", ".file", ".reqntid", ".maxntid", ".maxnreg",
    ".section", ".b8", ".b16", ".b32", ".b64", ".global", ".visible", ".param", ".extern",
)  # fmt: skip
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)\s*(.*?)\{", re.S)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\b[^,]*?(\w+)\s*$")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b8\s+(\w+)\[(\d*)\]")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$")
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_ADDRESS = re.compile(r"\[\s*([%$\w.]+)?\s*(?:\+?\s*(-?\w+))?\s*\]$")
_LABEL = re.compile(r"^\s*([$\w]+):")


def _number(text: str) -> int:
    return int(text.rstrip("U"), 0)


def _split(text: str) -> list[str]:
    """Split at commas outside of braces and brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


class _Parser:
    def __init__(self) -> None:
        self.kernel = Kernel()
        self.line = 0
        self.scopes: list[dict[str, str]] = []
        self.used_bytes = -1

    def refuse(self, what: str) -> UnknownInstruction:
        return UnknownInstruction(f"line {self.line}: {what}")

    def operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Group(tuple(self.operand(item) for item in _split(text[1:-1])))
        if match := _ADDRESS.match(text):
            base, offset = match.groups()
            if base is not None and _NUMBER.match(base) and offset is None:
                return Address(None, _number(base))
            return Address(self.name(base), _number(offset or "0"))
        if _NUMBER.match(text):
            return Immediate(_number(text))
        if match := re.match(r"0([fFdD])([0-9a-fA-F]+)$", text):
            return Immediate(int(match[2], 16), bits=True)
        name = self.name(text)
        if name in self.kernel.labels:
            return Symbol(name)
        if text.startswith("%") or text == "_" or name != text:
            return Register(name)
        if re.fullmatch(r"[$\w]+", text):
            return Symbol(text)
        raise self.refuse(f"unknown operand {text!r}")

    def name(self, text: str) -> str:
        return next((scope[text] for scope in reversed(self.scopes) if text in scope), text)

    def declare(self, kind: str, names: str) -> None:
        for name in _split(names):
            if match := re.match(r"(%\w+)<\d+>$", name):
                self.kernel.types[match[1]] = kind
            else:
                unique = f"{name}@{self.line}"
                self.scopes[-1][name] = unique
                self.kernel.types[unique] = kind

    def statement(self, text: str) -> None:
        if match := _REGISTERS.match(text):
            self.declare(*match.groups())
            return
        if match := re.match(r'\.pragma\s+"used_bytes_mask (\w+)"', text):
            self.used_bytes = _number(match[1])
            return
        if text.startswith("."):
            if text.split()[0] not in _IGNORED and text != '.pragma "nounroll"':
                raise self.refuse(f"unknown directive {text!r}")
            return
        match = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
        if match is None:
            raise self.refuse(f"not an instruction: {text!r}")
        negated, guard, opcode, operands = match.groups()
        parsed = tuple(self.operand(part) for part in _split(operands.replace("|", ",")))
        if guard and parsed:
            written = parsed[0].items if isinstance(parsed[0], Group) else parsed[:1]
            self.kernel.guarded |= {item.name for item in written if isinstance(item, Register)}
        self.kernel.instructions.append(
            Instruction(
                self.line, " ".join(text.split()), opcode, parsed,
                guard and self.name(guard), bool(negated), self.used_bytes,
            )
        )  # fmt: skip
        self.used_bytes = -1

    def body(self, lines: list[str], first_line: int) -> None:
        pending = ""
        for number, text in enumerate(lines, first_line):
            text = text.split("//")[0].strip()
            if not text or (not pending and re.match(r"\.(loc|file)\s", text)):
                continue
            if not pending:
                self.line = number
            if (match := _LABEL.match(text)) and not pending:
                label = match[1]
                if len(self.scopes) > 1:
                    label = self.scopes[-1].setdefault(label, f"{label}@{number}")
                self.kernel.labels[label] = len(self.kernel.instructions)
                text = text[match.end() :].strip()
            pending += " " + text
            # Braces of operands do not contain a semicolon; those of scopes begin a statement.
            while pending := pending.strip():
                if pending[0] == "{":
                    self.scopes.append({})
                    pending = pending[1:]
                elif pending[0] == "}":
                    if len(self.scopes) == 1:
                        return
                    self.scopes.pop()
                    pending = pending[1:]
                elif ";" in pending:
                    statement, pending = pending.split(";", 1)
                    self.statement(statement.strip())
                else:
                    break
        raise self.refuse("the kernel does not end")


def parse(text: str) -> Kernel:
    """Parse the only kernel of a PTX text.

    Raises:
        UnknownInstruction: A directive or operand is not known; opcodes are checked by the machine.
    """
    parser = _Parser()
    kernel = parser.kernel
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1 or re.search(r"\.func\b", text):
        raise parser.refuse(f"{len(entries)} kernels or a function; one kernel is supported")
    entry = entries[0]
    kernel.name = entry[1]
    for part in entry[2].split(","):
        if part.strip():
            match = _PARAMETER.search(part.strip())
            if match is None:
                raise parser.refuse(f"unknown parameter {part.strip()!r}")
            kernel.parameters.append((match[2], match[1]))
    threads = re.search(r"\.reqntid\s+(\d+)\s*(?:,\s*1)*\s*$", entry[3].strip())
    kernel.threads = int(threads[1]) if threads else 0
    for align, name, size in _SHARED.findall(text[: entry.start()]):
        start = -(-kernel.static_bytes // int(align or 1)) * int(align or 1)
        kernel.shared[name] = start
        kernel.alignment = max(kernel.alignment, int(align or 1))
        kernel.static_bytes = start + int(size or 0)
    first_line = text.count("\n", 0, entry.end()) + 1
    parser.scopes.append({})
    parser.body(text[entry.end() :].split("\n"), first_line)
    return kernel
