# SPDX-License-Identifier: Apache-2.0
"""The instruction sets of the attention kernels. Reads torch's CPU flags; never imports numba.

Each instruction set has a module `attend_<name>` with a function `work`. All of them compute with
integers: query codes times key codes, and integer weights times value codes.
"""

from __future__ import annotations

import functools

import torch

PORTABLE = "portable"
AVX512_VNNI = "avx512_vnni"
AMX = "amx"

_AVX512_FLAGS = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vnni")

_FLAGS = {
    PORTABLE: (),
    AVX512_VNNI: _AVX512_FLAGS,
    AMX: (*_AVX512_FLAGS, "amx_tile", "amx_int8"),
}
"""The CPU flags that each set needs, slowest set first. Faster sets include slower sets' flags."""

ALL = tuple(_FLAGS)


@functools.lru_cache(maxsize=1)
def available() -> tuple[str, ...]:
    """Return the instruction sets that this CPU can run, slowest first; `PORTABLE` always."""
    # A process must request AMX's tile registers from the operating system, which may refuse.
    return tuple(isa for isa in ALL if not lacking(isa) and (isa != AMX or torch.cpu._init_amx()))


def lacking(isa: str) -> tuple[str, ...]:
    """Return the flags (torch's names) that an instruction set needs and this CPU lacks."""
    flags = torch.cpu.get_capabilities()
    return tuple(name for name in _FLAGS[isa] if not flags.get(name, False))


def require(isa: str) -> str:
    """Return `isa` if it is known and this CPU can run it; otherwise raise a ValueError."""
    if isa not in ALL:
        raise ValueError(f"unknown CPU instruction set {isa!r}: choose one of {', '.join(ALL)}")
    if isa not in available():
        choices = ", ".join(available())
        raise ValueError(
            f"this CPU cannot run the instruction set {isa!r}: choose one of {choices}"
        )
    return isa
