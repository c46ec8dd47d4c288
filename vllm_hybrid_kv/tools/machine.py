# SPDX-License-Identifier: Apache-2.0
"""Describe the CPU of this machine."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu_model() -> str:
    """Return the name of the CPU's model, or its architecture if the name is unknown."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace") if file.exists() else ""
    named = re.search(r"^model name\s*:\s*(\S.*)", lines, re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()
