# SPDX-License-Identifier: Apache-2.0
"""Run the CPU kernels in a child process."""

from __future__ import annotations

import os
import subprocess
import sys

ATTEND = """
import torch
from vllm_hybrid_kv.kernels.cpu import paged_attention
query = torch.ones(1, 2, 64)
cache = torch.zeros(1, 1, 16, 100, dtype=torch.uint8)
cache[0, 0].view(-1)[16 * 96 + 32 : 16 * 96 + 64] = torch.tensor(
    [2.0] * 16, dtype=torch.float16).view(torch.uint8)
out = torch.zeros_like(query)
index = lambda *numbers: torch.tensor(numbers, dtype=torch.int32)
paged_attention(query, cache, index(0)[None], index(5), index(0, 1), out, scale=1.0)
assert (out == 2.0).all(), out
"""
"""Attend to five tokens of value 2 (code 0, zero 2) on the portable path."""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a child process with more environment variables."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def output_of(result: subprocess.CompletedProcess[str]) -> str:
    """Return the output of a child process that must have succeeded."""
    assert result.returncode == 0, result.stderr
    return result.stdout
