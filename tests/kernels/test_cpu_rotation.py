# SPDX-License-Identifier: Apache-2.0
"""The CPU rotation adds the same numbers as the reference, in the same order."""

import numba
import numpy as np
import pytest
import torch

from vllm_hybrid_kv.kernels import reference
from vllm_hybrid_kv.kernels.cpu import rotation
from vllm_hybrid_kv.kernels.cpu.llvm import LANES

HEAD_SIZES = [64, 72, 80, 96, 112, 128, 160, 192, 256, 512]


@numba.njit
def rotate_in_place(row: int, head_size: int, extremes: int) -> None:
    rotation.rotate_with_extremes(row, head_size, extremes)


def rotate(row: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Return the rotated row, its smallest number and its largest number."""
    head_size = len(row)
    # The kernel reads whole vectors. Pad with the last eight numbers, which add no new extremes.
    padded = np.resize(row, -(-head_size // LANES) * LANES)
    padded[head_size:] = row[-LANES // 2 :][: len(padded) - head_size]
    extremes = np.empty((2, LANES), np.float32)
    rotate_in_place(padded.ctypes.data, head_size, extremes.ctypes.data)
    unit = np.float32(rotation.unit(head_size))
    return padded[:head_size] * unit, extremes[0].min() * unit, extremes[1].max() * unit


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_the_rotated_bits_equal_the_reference(head_size: int) -> None:
    # Large numbers that cancel, plus small ones: the sum depends on the order of the additions.
    random = np.random.default_rng(head_size)
    small = random.normal(size=(200, head_size))
    large = random.choice([0, 0, 1e5, -1e5, 3e7], (200, head_size))
    for row in (small + large).astype(np.float32):
        expected = reference.rotate(torch.from_numpy(row)).numpy()
        rotated, smallest, largest = rotate(row)
        assert (rotated.view(np.int32) == expected.view(np.int32)).all()
        assert (smallest, largest) == (expected.min(), expected.max())
