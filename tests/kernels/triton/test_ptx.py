# SPDX-License-Identifier: Apache-2.0
"""The inline assembly of the kernels gives the right result for all inputs, executed."""

from __future__ import annotations

import re

import numpy as np
import torch

from testing.triton import ptx
from tests.kernels.ptx.snippets import run
from vllm_hybrid_kv.kernels.triton import convert

WORDS = np.arange(65536, dtype=np.uint32)
# Registers in which each 16-bit word is the lower half once and the upper half once.
PAIRS = WORDS | ((WORDS * 40503 + 12345) % 65536) << np.uint32(16)


def decoded() -> np.ndarray:
    """Return the four output registers, uint32 [4, words], for every word of `PAIRS`."""
    out = np.zeros((4, len(PAIRS)), np.uint32)
    assembly = re.sub(r"\$(\d)", r"%r1\1", convert.VALUE_PTX.value)
    lines = ["mul.wide.u32 %rd10, %r902, 4;", "add.s64 %rd11, %rd0, %rd10;"]
    lines += ["add.s64 %rd12, %rd1, %rd10;", "ld.global.b32 %r14, [%rd11];", assembly]
    lines += [f"st.global.b32 [%rd12+{4 * i * len(PAIRS)}], %r1{i};" for i in range(4)]
    run("\n".join(lines), PAIRS, out, programs=len(PAIRS) // 32)
    return out


def halves(register: np.ndarray) -> torch.Tensor:
    """Split registers into fp16 numbers: float32 [registers, 2], the lower half first."""
    return torch.from_numpy(register.view(np.int16).copy()).view(torch.float16).float().view(-1, 2)


def test_masks_select_every_value_code() -> None:
    words = torch.from_numpy(PAIRS.view(np.uint16).astype(np.int32)).view(-1, 2)
    for dim, register in enumerate(decoded()):
        unit = convert.HIGH_CODE_UNIT if dim % 2 else convert.LOW_CODE_UNIT
        assert torch.equal(halves(register), (words >> 4 * dim & 15) * unit)


def test_outputs_written_before_the_last_read_have_their_own_register() -> None:
    outputs = convert.VALUE_OPERANDS.value.split(",")[:-1]
    marked = {i for i, operand in enumerate(outputs) if operand.startswith("=&")}
    assert ptx.written_before_last_read(convert.VALUE_PTX.value, len(outputs)) <= marked
