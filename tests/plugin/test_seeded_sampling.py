# SPDX-License-Identifier: Apache-2.0
"""On CPUs, samples that vLLM discards do not change the later samples of a seeded request."""

import torch

from vllm_hybrid_kv.patches.sampling import RewindableGenerator


def draw(generator):
    return torch.empty(8).exponential_(generator=generator)


def discard(generator, chunks):
    for _ in range(chunks):
        draw(generator)
        # This is how vLLM's model runner undoes a discarded sample.
        generator.set_offset(generator.get_offset() - 4)


def test_discarded_samples_do_not_change_later_samples():
    plain = torch.Generator().manual_seed(7)
    expected = [draw(plain) for _ in range(4)]
    generator = RewindableGenerator(device="cpu")
    generator.manual_seed(7)
    generator.join_batch()
    discard(generator, chunks=3)
    found = [draw(generator), draw(generator)]
    # A preempted request joins the batch again, and its prompt is computed again.
    generator.join_batch()
    discard(generator, chunks=2)
    found += [draw(generator), draw(generator)]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
