# SPDX-License-Identifier: Apache-2.0
"""Every PTX sequence of the kernels gives the right result for all inputs, emulated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl

from testing.triton import ptx
from vllm_hybrid_kv.kernels.triton import convert

WORDS = np.arange(65536, dtype=np.uint32)
# Each 16-bit word once in the lower half of a register and once in the upper, with another word.
PAIRS = WORDS | ((WORDS * 40503 + 12345) % 65536) << np.uint32(16)


def halves(register: np.ndarray) -> torch.Tensor:
    """Return float32 [words, 2]: the fp16 numbers in the lower and the upper half."""
    return torch.from_numpy(register.view(np.int16).copy()).view(torch.float16).float().view(-1, 2)


def keys() -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 [words, 2]: even and odd dims of both words of PAIRS."""
    codes = torch.from_numpy(PAIRS.view(np.uint8).copy()).view(-1, 2, 2)
    numbers = codes.view(torch.float8_e4m3fn).float()
    return numbers[..., 0], numbers[..., 1]


def test_integer_arithmetic_widens_every_key_and_nan_to_480() -> None:
    for register, wanted in zip(
        ptx.run(convert.INTEGER_KEY_PTX.value, 2, [PAIRS]), keys(), strict=True
    ):
        numbers = halves(register) * convert.INTEGER_KEY_UNIT.value
        assert torch.equal(numbers[~wanted.isnan()], wanted[~wanted.isnan()])
        assert (numbers[wanted.isnan()].abs() == 480.0).all()
        assert torch.equal(numbers.signbit(), wanted.signbit())


def test_the_conversion_instruction_widens_every_key() -> None:
    for register, wanted in zip(
        ptx.run(convert.NATIVE_KEY_PTX.value, 2, [PAIRS]), keys(), strict=True
    ):
        torch.testing.assert_close(halves(register), wanted, rtol=0, atol=0, equal_nan=True)


def test_masks_widen_every_value_code() -> None:
    words = torch.from_numpy(PAIRS.view(np.uint16).astype(np.int32)).view(-1, 2)
    for dim, register in enumerate(ptx.run(convert.VALUE_PTX.value, 4, [PAIRS])):
        unit = convert.HIGH_CODE_UNIT if dim % 2 else convert.LOW_CODE_UNIT
        assert torch.equal(halves(register), (words >> 4 * dim & 15) * unit)


@pytest.mark.parametrize(
    ("assembly", "operands"),
    [
        (convert.INTEGER_KEY_PTX, convert.INTEGER_KEY_OPERANDS),
        (convert.NATIVE_KEY_PTX, convert.NATIVE_KEY_OPERANDS),
        (convert.VALUE_PTX, convert.VALUE_OPERANDS),
    ],
    ids=["integer keys", "native keys", "values"],
)
def test_outputs_written_before_the_last_read_have_their_own_register(
    assembly: tl.constexpr, operands: tl.constexpr
) -> None:
    outputs = operands.value.split(",")[:-1]
    marked = {i for i, operand in enumerate(outputs) if operand.startswith("=&")}
    assert ptx.written_before_last_read(assembly.value, len(outputs)) <= marked
