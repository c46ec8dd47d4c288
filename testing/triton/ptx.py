# SPDX-License-Identifier: Apache-2.0
"""Find outputs of inline assembly that must not share a register with an input."""

from __future__ import annotations

import re


def written_before_last_read(assembly: str, outputs: int) -> set[int]:
    """Return the outputs that are written before an input's last read, and so need a `&`."""
    last_read, writes = 0, {}
    statements = filter(None, (part.strip() for part in assembly.strip(" {}\n").split(";")))
    for at, statement in enumerate(statements):
        name, destination, *sources = re.split(r"[\s,]+", statement)
        if name == ".reg":
            continue
        if any(f"${i}" in sources for i in range(outputs, outputs + 4)):
            last_read = at
        if destination.startswith("$"):
            writes[int(destination[1:])] = at
    return {output for output, at in writes.items() if at < last_read}
