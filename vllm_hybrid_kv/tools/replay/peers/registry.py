# SPDX-License-Identifier: Apache-2.0
"""Find the simulated policies of a peer by its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_hybrid_kv.tools.replay.peers.loop import Peer, Sizes
from vllm_hybrid_kv.tools.replay.peers.marconi import ALPHAS, Marconi
from vllm_hybrid_kv.tools.replay.peers.sglang import SGLang

_POLICIES: dict[str, Callable[[Sizes], Sequence[Peer]]] = {
    "sglang": lambda sizes: [SGLang(sizes)],
    "marconi": lambda sizes: [Marconi(sizes, alpha) for alpha in ALPHAS],
}


def best_run(name: str, sizes: Sizes, run: Callable[[Peer], object]) -> Peer:
    """Run every variant of a peer, and return the one that hit most tokens."""
    variants = _POLICIES[name](sizes)
    for variant in variants:
        run(variant)
    return max(variants, key=lambda variant: variant.tally.hit_tokens)
