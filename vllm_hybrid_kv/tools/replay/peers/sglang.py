# SPDX-License-Identifier: Apache-2.0
"""SGLang's cache of hybrid models, with its defaults: two pools of fixed sizes, LRU in each.

This follows the description of SGLang 0.5's radix cache with extra buffers for states. Pools: 9 of
19 parts of the memory hold states, the rest holds keys and values. States are cached at the end of
each chunk of a prompt, rounded down to 64 tokens, or instead at a branch point within the chunk,
and at the last multiple of 256 tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_hybrid_kv.tools.replay.peers.loop import Peer, Running, Sizes
from vllm_hybrid_kv.tools.replay.peers.tree import Node

PAGE = 64
"""Tokens of a page."""

STATES_TO_TOKENS = 0.9
"""Memory of the pool of states, relative to that of the pool of tokens."""

TRACK_INTERVAL = 256
"""An answer's state is kept every so many tokens."""

STATES_PER_REQUEST = 3
"""A running request has one state, and two buffers for states to cache."""

SLOTS_PER_REQUEST = 5
"""At most one request runs for so many slots of the pool of states."""


class SGLang(Peer):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes, PAGE)
        share = STATES_TO_TOKENS / (1 + STATES_TO_TOKENS)
        self.state_slots = int(share * sizes.memory / sizes.state)
        self.token_slots = int((1 - share) * sizes.memory / sizes.token)

    def make_room(self, running: Sequence[Running]) -> bool:
        reserved = self.reserved(running)
        if (
            len(running) > self.state_slots // SLOTS_PER_REQUEST
            or reserved + self.unit * self.tree.pinned > self.token_slots
        ):
            return False
        while reserved + self.unit * self.tree.units > self.token_slots:
            self._evict_units()
        self._evict_states(self.state_slots - STATES_PER_REQUEST * len(running))
        return True

    def computed(self, request: Running, start: int) -> None:
        if start >= request.prompt:
            if request.done % TRACK_INTERVAL == 0:
                request.tracked = request.done
            return
        if request.done - start < PAGE:
            return
        end = start + (request.done - start) // PAGE * PAGE
        self._cache(request, request.branch if start < request.branch < end else end)

    def finish(self, request: Running) -> None:
        if request.tracked:
            self._cache(request, request.tracked)

    def touch(self, node: Node) -> None:
        node.state_used = self.clock
        for one in node.path():
            one.used = self.clock

    def _cache(self, request: Running, tokens: int) -> None:
        node = self.tree.insert(request.units[: tokens // self.unit])
        if not node.state:
            free = self.state_slots - STATES_PER_REQUEST * len(self.running)
            self.tree.pin(node, 1)
            self._evict_states(free - 1)
            self.tree.pin(node, -1)
            self.tree.set_state(node, True)
        self.touch(node)
        if node.depth > request.node.depth:
            self.move(request, node)

    def _evict_units(self) -> None:
        leaves = (node for node in self.tree.nodes if not (node.children or node.pins))
        self._remove(min(leaves, key=lambda node: node.used))

    def _evict_states(self, most: int) -> None:
        """Evict states until the tree has at most `most`."""
        held = {request.node for request in self.running}
        while self.tree.states > most:
            free = [node for node in self.tree.nodes if node.state and node not in held]
            if not free:
                return
            node = min(free, key=lambda node: node.state_used)
            if node.children or node.pins:
                self.tree.set_state(node, False)
            else:
                self._remove(node)

    def _remove(self, leaf: Node) -> None:
        """Remove a leaf, and then ancestors that are leaves without a state."""
        node: Node | None = leaf
        while node is not None and node.parent is not None:
            parent = node.parent
            self.tree.remove_leaf(node)
            removable = not (parent.children or parent.pins or parent.state)
            node = parent if removable else None
