# SPDX-License-Identifier: Apache-2.0
"""Sizes of memory as people write them."""

from __future__ import annotations

import re

UNITS = {"": 1, **{f"{letter}ib": 1 << 10 * (i + 1) for i, letter in enumerate("kmgt")}}
UNITS |= {f"{letter}b": 10 ** (3 * (i + 1)) for i, letter in enumerate("kmgt")}
UNITS |= {letter: UNITS[f"{letter}ib"] for letter in "kmgt"}
UNITS["b"] = 1

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Return the bytes that a size means.

    Args:
        text: A number with a unit: KiB, MiB, GiB, TiB or K, M, G, T are powers of 1024; KB, MB,
            GB, TB of 1000. Without a unit it is bytes.

    Raises:
        ValueError: It is no size, or none at all.
    """
    match = _SIZE.fullmatch(text)
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or (size := int(float(match[1]) * unit)) <= 0:
        raise ValueError(
            f"{text!r} is not a size; write it like 20GiB, 512MiB or a number of bytes"
        )
    return size


def format_size(size: int) -> str:
    """Write bytes as GiB."""
    return f"{size / (1 << 30):g} GiB"
