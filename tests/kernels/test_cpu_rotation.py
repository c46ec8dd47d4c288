# SPDX-License-Identifier: Apache-2.0
"""Rows are rotated on CPUs with the reference's additions, in the reference's order."""

import numba
import numpy as np
import pytest
import torch

from vllm_hybrid_kv.kernels import reference
from vllm_hybrid_kv.kernels.cpu import lanes, rotation

HEAD_SIZES = [64, 72, 80, 96, 112, 128, 160, 192, 256, 512]


@numba.njit
def rotated(row: int, head_size: int, extremes: int) -> None:
    """Rotate in place, and write the extremes of each lane."""
    lo, hi = rotation.rotate(row, head_size)
    lanes.store_floats(extremes, lo)
    lanes.store_floats(extremes + 4 * lanes.LANES, hi)


def rotate(row: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Rotate a row on the CPU, in memory that goes on as the kernel asks for."""
    head_size = len(row)
    memory = np.resize(row, -(-head_size // lanes.LANES) * lanes.LANES)
    memory[head_size:] = row[-lanes.LANES // 2 :][: len(memory) - head_size]
    extremes = np.empty((2, lanes.LANES), np.float32)
    rotated(memory.ctypes.data, head_size, extremes.ctypes.data)
    unit = np.float32(rotation.unit(head_size))
    return memory[:head_size] * unit, extremes[0].min() * unit, extremes[1].max() * unit


def rows(head_size: int) -> np.ndarray:
    """Rows whose sums depend on their order: large numbers that cancel, beside small ones."""
    random = np.random.default_rng(head_size)
    small = random.normal(size=(200, head_size))
    large = random.choice([0, 0, 1e5, -1e5, 3e7], (200, head_size))
    return (small + large).astype(np.float32)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_the_bits_are_those_of_the_reference(head_size: int) -> None:
    for row in rows(head_size):
        expected = reference.rotate(torch.from_numpy(row)).numpy()
        found, smallest, largest = rotate(row)
        assert (found.view(np.int32) == expected.view(np.int32)).all()
        assert (smallest, largest) == (expected.min(), expected.max())


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rotating_twice_gives_what_was_there(head_size: int) -> None:
    row = np.random.default_rng(1).normal(size=head_size).astype(np.float32)
    again, _, _ = rotate(rotate(row)[0])
    np.testing.assert_allclose(again, row, atol=1e-5)
