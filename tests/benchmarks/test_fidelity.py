# SPDX-License-Identifier: Apache-2.0
"""What the pages are worth beside vLLM's rule, on few samples, and that the study measures them."""

import pytest
import torch

from benchmarks.fidelity import measure, rules, sources
from vllm_hybrid_kv.kernels import reference


def ratios(name: str, head_size: int) -> dict[str, float]:
    """Error of our output relative to stock's, by size of the scores."""
    samples = sources.drawn(head_size, 256, seed=1)
    errors = measure.errors_of_values(next(s for s in samples if s.name == name))
    return {kind: of[rules.OURS] / of[rules.STOCK] for kind, of in errors.items()}


@pytest.mark.parametrize("name", ["Student t, 3", "1 in 50 x 8"])
def test_heavy_tails_cost_much_less_than_with_vllms_rule(name: str) -> None:
    assert max(ratios(name, 128).values()) <= 0.8


@pytest.mark.parametrize("name", ["channels x 6", "channels x 20"])
def test_outlier_channels_cost_much_less_than_with_vllms_rule(name: str) -> None:
    assert max(ratios(name, 128).values()) <= 0.8


@pytest.mark.parametrize("name", ["Gaussian", "channel means", "offset 10"])
def test_values_that_need_no_rotation_cost_what_they_do_with_vllms_rule(name: str) -> None:
    # Up to what differs by chance from sample to sample.
    assert all(0.9 < ratio < 1.1 for ratio in ratios(name, 128).values())


def test_what_the_study_calls_k8v4_is_what_is_stored() -> None:
    value = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0))
    _, back = reference.dequantise(reference.quantise(value, value))
    assert torch.equal(rules.chosen(value), back)
    assert torch.equal(rules.rotated(rules.covering(0.0))(value), back)


def test_vllms_rule_rounds_to_the_nearest_and_its_scale_and_zero_to_fp16() -> None:
    row = torch.tensor([0.1, 0.1 + 15 * 0.3, 0.1 + 0.149, 0.1 + 0.151])
    scale, zero = (float(torch.tensor(x, dtype=torch.float16)) for x in (0.3, 0.1))
    wanted = torch.tensor([zero, zero + 15 * scale, zero, zero + scale])
    torch.testing.assert_close(rules.stock(row), wanted, atol=1e-6, rtol=0)
