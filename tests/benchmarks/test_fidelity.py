# SPDX-License-Identifier: Apache-2.0
"""The error of stored pages compared with vLLM's rule, on few samples."""

import pytest
import torch

from benchmarks.fidelity import measure, rules, sources
from vllm_hybrid_kv.kernels import reference


def ratios(name: str) -> list[float]:
    """Return the error of our output relative to stock's, for each size of the scores."""
    samples = sources.drawn(128, 256, seed=1)
    errors = measure.errors_of_values(next(s for s in samples if s.name == name))
    return [of[rules.OURS] / of[rules.STOCK] for of in errors.values()]


@pytest.mark.parametrize("name", ["Student t, 3", "1 in 50 x 8", "channels x 6", "channels x 20"])
def test_heavy_tails_and_outlier_channels_have_a_smaller_error_than_stock(name: str) -> None:
    assert max(ratios(name)) <= 0.8


@pytest.mark.parametrize("name", ["Gaussian", "channel means", "offset 10"])
def test_values_that_need_no_rotation_have_the_error_of_stock(name: str) -> None:
    # Up to random differences between samples.
    assert all(0.9 < ratio < 1.1 for ratio in ratios(name))


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
