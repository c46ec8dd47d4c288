# SPDX-License-Identifier: Apache-2.0
"""Marconi (arXiv 2411.19379): states at branch points and at ends of answers, one pool of memory.

Nodes with at most one child can be evicted; if there is a child, it keeps the keys and values. The
node with the lowest score goes first:

    score = recency + alpha x operations that the node saves / bytes of the node

Both terms are scaled to 0 to 1 over all nodes that can be evicted. Recency is 1 / age. A node saves
the operations from its parent's end to its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_hybrid_kv.tools.replay.peers.loop import Peer, Running, Sizes
from vllm_hybrid_kv.tools.replay.peers.tree import Node

ALPHAS = (0.0, 0.03, 0.3, 2.0)
"""Weights of saved operations. The paper tunes alpha online. The simulation replays the trace with
each of these weights and reports the best, which no server can know in advance."""


class Marconi(Peer):
    def __init__(self, sizes: Sizes, alpha: float) -> None:
        # The paper matches single tokens. Units make the simulation fast.
        super().__init__(sizes, 16)
        self.alpha = alpha

    def make_room(self, running: Sequence[Running]) -> bool:
        # A request needs its own state, and one for its branch point until that is cached.
        states = len(running) + sum(request.done < request.branch for request in running)
        needed = self.sizes.token * self.reserved(running) + self.sizes.state * states
        pinned = sum(node.state for node in self.tree.nodes if node.pins)
        if needed + self._bytes(self.tree.pinned, pinned) > self.sizes.memory:
            return False
        while needed + self._bytes(self.tree.units, self.tree.states) > self.sizes.memory:
            self._evict()
        return True

    def computed(self, request: Running, start: int) -> None:
        if start < request.branch <= request.done:
            node = self.tree.insert(request.units[: request.branch // self.unit])
            self.tree.set_state(node, True)
            node.used = self.clock
            self.move(request, node)

    def finish(self, request: Running) -> None:
        node = self.tree.insert(request.units)
        self.tree.set_state(node, True)
        node.used = self.clock

    def touch(self, node: Node) -> None:
        # Only the node that is hit, not its ancestors.
        node.used = self.clock

    def _bytes(self, units: int, states: int) -> int:
        return self.sizes.token * self.unit * units + self.sizes.state * states

    def _evict(self) -> None:
        """Evict the node with the lowest score."""
        nodes = [node for node in self.tree.nodes if not node.pins and len(node.children) < 2]
        recency = _scaled([1 / (self.clock - node.used + 1) for node in nodes])
        efficiency = _scaled([self._efficiency(node) for node in nodes])
        scores = [a + self.alpha * b for a, b in zip(recency, efficiency, strict=True)]
        node = nodes[scores.index(min(scores))]
        if node.children:
            self.tree.merge_with_child(node)
        else:
            self.tree.remove_leaf(node)

    def _efficiency(self, node: Node) -> float:
        end = self.unit * node.depth
        start = end - self.unit * len(node.key)
        # A token attends to all tokens before it.
        attended = (end**2 - start**2) / 2
        flops = self.sizes.linear_flops * (end - start) + self.sizes.attention_flops * attended
        return flops / (self.sizes.state + self.sizes.token * (end - start))


def _scaled(values: Sequence[float]) -> list[float]:
    """Scale values linearly to 0 to 1."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
