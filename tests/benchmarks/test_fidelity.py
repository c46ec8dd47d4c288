# SPDX-License-Identifier: Apache-2.0
"""The error of stored pages compared with vLLM's rule, on few samples."""

import pytest
import torch

from benchmarks.fidelity import measure, rules, sources
from vllm_hybrid_kv.kernels import reference


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        # With heavy tails or outlier channels our error is smaller than stock's.
        ("Student t, 3", 0.0, 0.8),
        ("1 in 50 x 8", 0.0, 0.8),
        ("channels x 6", 0.0, 0.8),
        ("channels x 20", 0.0, 0.8),
        # With other values our error is stock's, up to random differences between samples.
        ("Gaussian", 0.9, 1.1),
        ("channel means", 0.9, 1.1),
        ("offset 10", 0.9, 1.1),
    ],
)
def test_rotation_reduces_the_error_of_heavy_tails_only(
    name: str, least: float, most: float
) -> None:
    samples = sources.drawn(128, 256, seed=1)
    errors = measure.errors_of_values(next(s for s in samples if s.name == name))
    assert all(least < of[rules.OURS] / of[rules.STOCK] < most for of in errors.values())


def test_the_rule_k8v4_is_the_kernels_rule() -> None:
    value = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0))
    _, dequantised = reference.dequantise(reference.quantise(value, value))
    assert torch.equal(rules.chosen(value), dequantised)
    assert torch.equal(rules.rotated(rules.covering(0.0))(value), dequantised)


def test_stocks_rule_rounds_to_nearest_with_an_fp16_scale_and_zero() -> None:
    row = torch.tensor([0.1, 0.1 + 15 * 0.3, 0.1 + 0.149, 0.1 + 0.151])
    scale, zero = (float(torch.tensor(x, dtype=torch.float16)) for x in (0.3, 0.1))
    wanted = torch.tensor([zero, zero + 15 * scale, zero, zero + scale])
    torch.testing.assert_close(rules.stock(row), wanted, atol=1e-6, rtol=0)
