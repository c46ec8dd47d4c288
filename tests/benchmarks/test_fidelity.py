# SPDX-License-Identifier: Apache-2.0
"""On a few samples, compare the error of k8v4 pages with that of other quantisation rules."""

import pytest
import torch

from benchmarks.fidelity import measure, report, rules, sources
from vllm_hybrid_kv.kernels import reference


def rows() -> torch.Tensor:
    return torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        # The rotation spreads heavy tails and outlier channels, so values get smaller steps. Keys
        # in int8 err less than in fp8.
        ("Student t, 3", 0.0, 0.75),
        ("1 in 50 x 8", 0.0, 0.75),
        ("channels x 20", 0.0, 0.75),
        # Without a zero point, values have a wider range than in vLLM's rule. Keys err little.
        ("Gaussian", 0.9, 1.2),
        # Without a zero point, the range of values must also cover the mean that all dims share.
        ("offset 10", 1.0, 8.0),
    ],
)
def test_format_2_is_better_than_vllms_rule_except_with_a_mean_of_all_dims(
    name: str, least: float, most: float
) -> None:
    sample = next(s for s in sources.drawn(128, 256, seed=1) if s.name == name)
    for of in measure.errors(sample).values():
        assert least < of[rules.FORMAT_2] / of[rules.VLLM] < most


def test_format_2_is_what_the_kernels_store() -> None:
    key, value = rows(), rows().flip(0)
    stored = reference.dequantise(reference.quantise(key, value))
    rule = rules.RULES[rules.FORMAT_2]
    assert torch.equal(rule.key(key), stored[0])
    assert torch.equal(rule.value(value), stored[1])
    assert torch.equal(rule.query(key), reference.round_query(key))


def test_vllms_rule_rounds_to_nearest_with_an_fp16_scale_and_zero() -> None:
    row = torch.tensor([0.1, 0.1 + 15 * 0.3, 0.1 + 0.149, 0.1 + 0.151])
    scale, zero = (float(torch.tensor(x, dtype=torch.float16)) for x in (0.3, 0.1))
    wanted = torch.tensor([zero, zero + 15 * scale, zero, zero + scale])
    torch.testing.assert_close(rules.min_max(row), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("head_size", [64, 72, 128])
def test_rotated_min_max_errs_at_most_half_a_step_per_rotated_number(head_size: int) -> None:
    value = torch.randn(7, head_size, generator=torch.Generator().manual_seed(1))
    # The rotation keeps the norm of a row, so the range of its numbers is at most twice the norm.
    norm = value.norm(dim=-1)
    step = 2 * norm / 15
    error = (rules.rotated_min_max(value) - value).norm(dim=-1)
    # Rounding the scale and the zero point to fp16 may add 1 %.
    assert (error <= 1.01 * step / 2 * head_size**0.5).all()
    assert (error > 0).all()


def test_the_report_says_where_format_2_loses() -> None:
    samples = [
        s for seed in (0, 1) for s in sources.drawn(128, 128, seed)
        if s.name in ("one channel x 100", "offset 10")
    ]  # fmt: skip
    text = report.markdown(
        {
            "machine": {"cpu": "a CPU", "Python": "3", "torch": "2"},
            "command": "python -m benchmarks.fidelity",
            "seeds": {128: 2},
            "shown": (128, 128),
            "distributions": measure.summarise(samples),
            "recorded": [],
        }
    )
    lost = text.split("## Where", 1)[1].split("##", 1)[0]
    assert "2 of 4 errors are not above" in lost
    assert lost.count("* offset 10, 128 dims, 128 tokens, scores of") == 2
