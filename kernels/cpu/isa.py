# SPDX-License-Identifier: Apache-2.0
"""Which instructions the CPU kernels use. Reads torch's CPU flags; never imports numba.

Three paths compute the same attention: `PORTABLE` in float32 loops that run anywhere,
`AVX512_BF16` with the bf16 dot product, `AMX` with tile products beside it. Each faster path
needs everything the slower ones need.
"""

from __future__ import annotations

import functools
import os

import torch

PORTABLE = "portable"
AVX512_BF16 = "avx512_bf16"
AMX = "amx"

AUTO = "auto"
"""What the environment may say for the fastest path, as if it said nothing."""

ALL = (PORTABLE, AVX512_BF16, AMX)
"""Every path, slowest first."""

ENVIRONMENT = "VLLM_HYBRID_KV_CPU_ISA"
"""Environment variable that asks for a path other than the fastest."""

# The key decoder permutes bytes through a 128-entry table (VBMI), so that a CPU with the dot
# product but without the permute (Cooper Lake) stays on the portable path.
_AVX512_FLAGS = ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_vbmi", "avx512_bf16")
_AMX_FLAGS = ("amx_tile", "amx_bf16", "amx_int8")


@functools.lru_cache(maxsize=1)
def available() -> tuple[str, ...]:
    """Return the paths that this CPU can run, slowest first; `PORTABLE` is always one."""
    flags = torch.cpu.get_capabilities()
    found = [PORTABLE]
    if all(flags.get(name, False) for name in _AVX512_FLAGS):
        found.append(AVX512_BF16)
        # The kernel grants the tile registers to a process that asks for them, or refuses.
        if all(flags.get(name, False) for name in _AMX_FLAGS) and torch.cpu._init_amx():
            found.append(AMX)
    return tuple(found)


def lacking(isa: str) -> tuple[str, ...]:
    """Return the instructions that this CPU lacks for a path, by torch's names.

    Empty for a path that it can run, and for `AMX` where the operating system alone is in its way.
    """
    flags = torch.cpu.get_capabilities()
    needed = {PORTABLE: (), AVX512_BF16: _AVX512_FLAGS, AMX: (*_AVX512_FLAGS, *_AMX_FLAGS)}[isa]
    return tuple(name for name in needed if not flags.get(name, False))


def require(isa: str) -> str:
    """Return `isa` if this CPU can run it.

    Raises:
        ValueError: It is not a path's name, or the CPU lacks its instructions.
    """
    if isa not in ALL:
        raise ValueError(f"unknown CPU path {isa!r}: choose one of {', '.join(ALL)}")
    if isa not in available():
        raise ValueError(
            f"this CPU cannot run the path {isa!r}: it has {', '.join(available())}; "
            f"unset {ENVIRONMENT} to use the fastest of them"
        )
    return isa


def best_isa() -> str:
    """Return the fastest path of this CPU, or the one that `VLLM_HYBRID_KV_CPU_ISA` asks for.

    Raises:
        ValueError: The variable names no path, or one that this CPU cannot run.
    """
    asked = os.environ.get(ENVIRONMENT, "")
    return available()[-1] if asked in ("", AUTO) else require(asked)


def describe() -> str:
    """Return the path in use in a form for logs, such as `cpu:amx`."""
    return f"cpu:{best_isa()}"
