# SPDX-License-Identifier: Apache-2.0
"""A radix tree of token sequences, some of whose nodes have a state.

Sequences are tuples of units. A unit is the hash of a fixed number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Units = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """A node; the edge from its parent has the units `key`.

    Attributes:
        depth: Units from the root to the end of the edge.
        used: When a lookup last used the node's units.
        state_used: When a lookup last used the node's state.
        pins: How many running requests read the units of the edge.
        state: Whether the state at the end of the edge is cached.
    """

    key: Units
    parent: Node | None
    depth: int
    used: int = 0
    state_used: int = 0
    pins: int = 0
    state: bool = False
    children: dict[int, Node] = field(default_factory=dict)

    def path(self) -> Iterator[Node]:
        """Yield the node and its ancestors, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


class Tree:
    """The tree, with counts of its units, of its pinned units, and of its states."""

    def __init__(self) -> None:
        self.root = Node((), None, 0)
        self.nodes: set[Node] = set()
        self.units = self.pinned = self.states = 0

    def match(self, units: Units) -> tuple[Node, int]:
        """Return the deepest node with a state on the path of `units`, and the matched units."""
        node = found = self.root
        depth = 0
        while depth < len(units) and (child := node.children.get(units[depth])):
            common = _common(child.key, units[depth : depth + len(child.key)])
            depth += common
            if common < len(child.key):
                break
            node = child
            if node.state:
                found = node
        return found, depth

    def insert(self, units: Units) -> Node:
        """Return the node at the end of `units`; make it and split an edge if needed."""
        node = self.root
        while node.depth < len(units):
            rest = units[node.depth :]
            child = node.children.get(rest[0])
            if child is None:
                child = Node(rest, node, len(units))
                node.children[rest[0]] = child
                self.nodes.add(child)
                self.units += len(rest)
            elif (common := _common(child.key, rest)) < len(child.key):
                child = self._split(child, common)
            node = child
        return node

    def _split(self, node: Node, length: int) -> Node:
        """Insert a node after `length` units of an edge. Return the new node."""
        assert node.parent is not None
        upper = Node(
            node.key[:length],
            node.parent,
            node.depth - len(node.key) + length,
            node.used,
            pins=node.pins,
            children={node.key[length]: node},
        )
        node.parent.children[upper.key[0]] = upper
        node.key, node.parent = node.key[length:], upper
        self.nodes.add(upper)
        return upper

    def set_state(self, node: Node, state: bool) -> None:
        self.states += state - node.state
        node.state = state

    def pin(self, node: Node, count: int) -> None:
        """Add `count`, 1 or -1, to the pins of a node and its ancestors."""
        for one in node.path():
            was = one.pins
            one.pins += count
            self.pinned += len(one.key) * ((one.pins > 0) - (was > 0))

    def remove_leaf(self, node: Node) -> None:
        assert node.parent is not None
        assert not node.children
        self.set_state(node, False)
        del node.parent.children[node.key[0]]
        self.nodes.remove(node)
        self.units -= len(node.key)

    def merge_with_child(self, node: Node) -> None:
        """Drop a node's state, and make its edge a part of its only child's edge."""
        assert node.parent is not None
        (child,) = node.children.values()
        self.set_state(node, False)
        child.key, child.parent = node.key + child.key, node.parent
        node.parent.children[child.key[0]] = child
        self.nodes.remove(node)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many units two sequences share at their start."""
    if one == other:
        return len(one)
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
