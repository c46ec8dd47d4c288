# SPDX-License-Identifier: Apache-2.0
"""The errors of the PTX machine. Each names the line of PTX."""

from __future__ import annotations


class PTXError(Exception):
    """A kernel does something that a GPU does not define, or that this machine does not know."""


class UnknownInstruction(PTXError):
    """An opcode, modifier, operand or directive that the machine does not implement."""


class UninitialisedRead(PTXError):
    """A read of a register or of bytes that nothing has written."""


class OutOfBounds(PTXError):
    """An access to bytes that belong to no allocation."""


class Misaligned(PTXError):
    """An access to an address that is not a multiple of its size."""


class ReadBeforeWait(PTXError):
    """An access to bytes that an asynchronous copy may not have written yet."""


class Race(PTXError):
    """Two warps or programs access the same bytes in no defined order, and one of them writes."""


class UndefinedResult(PTXError):
    """An operation that PTX leaves undefined, such as a shuffle from an inactive lane."""


class Deadlock(PTXError):
    """Warps that wait for a barrier that the others cannot reach."""
