# SPDX-License-Identifier: Apache-2.0
"""A simulated scheduler that runs the cache policies of peers.

A step computes at most `max_num_batched_tokens` tokens: one for each request that answers, the rest
for prompts, first come first served. A request starts when its whole prompt and answer fit together
with those of the running requests, so none is preempted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, MambaSpec

from vllm_hybrid_kv.tools.output import ToolError
from vllm_hybrid_kv.tools.replay.peers.tree import Node, Tree, Units
from vllm_hybrid_kv.tools.replay.scheduler import Tally
from vllm_hybrid_kv.tools.replay.trace import Conversations, TracedRequest


@dataclass(frozen=True)
class Sizes:
    """What a cache stores.

    Attributes:
        memory: Bytes of the cache.
        state: Bytes of the states of all layers at one token.
        token: Bytes of the keys and values of one token in all layers.
        linear_flops: Operations of a token in all layers, without attention to other tokens.
        attention_flops: Operations of a token in all layers for each token that it attends to.
    """

    memory: int
    state: int
    token: int
    linear_flops: float
    attention_flops: float


def sizes(specs: Mapping[str, Any], memory: int, text_config: Any) -> Sizes:
    """Return the sizes of a model's cache, from its layers' specs.

    Raises:
        ToolError: A layer has neither full attention nor states.
    """
    state = token = attention = 0
    for name, spec in specs.items():
        if isinstance(spec, MambaSpec):
            state += spec.state_content_size_bytes
        elif isinstance(spec, FullAttentionSpec) and isinstance(spec, AttentionSpec):
            token += spec.page_size_bytes // spec.block_size
            attention += 1
        else:
            raise ToolError(
                f"peers are simulated for models of full attention and states, but {name} is a "
                f"{type(spec).__name__}; compare without --compare sglang and marconi"
            )
    if not (state and token):
        raise ToolError("peers are simulated for models that have full attention and states only")
    hidden, heads = text_config.hidden_size, text_config.num_attention_heads
    dims = getattr(text_config, "head_dim", None) or hidden // heads
    # A layer of width h has about 12 h² weights that a token uses, and each costs 2 operations.
    linear = 24.0 * hidden**2 * len(specs)
    return Sizes(memory, state, token, linear, 4.0 * heads * dims * attention)


@dataclass
class Running:
    """A running request.

    Attributes:
        units: The prompt and the answer, in whole units.
        prompt: Tokens of the prompt.
        total: Tokens of the prompt and the answer.
        node: The pinned node: the request reads the units up to it from the tree.
        done: Computed or cached tokens.
        branch: Tokens up to which a state would have been a hit, but was not cached; or 0.
        tracked: Tokens up to the newest state that the policy may cache; or 0.
    """

    index: int
    units: Units
    prompt: int
    total: int
    node: Node
    done: int = 0
    branch: int = 0
    tracked: int = 0


@dataclass(eq=False)
class Peer(ABC):
    """A cache policy, and the simulated scheduler that uses it."""

    sizes: Sizes
    unit: int
    """Tokens of a unit. Hits end at multiples of it."""

    tree: Tree = field(default_factory=Tree)
    running: list[Running] = field(default_factory=list)
    clock: int = 0
    tally: Tally = field(default_factory=Tally)

    @abstractmethod
    def make_room(self, running: Sequence[Running]) -> bool:
        """Evict until all tokens and states of the requests fit; the last is about to start.

        Return False, and evict nothing, if they cannot fit. All their nodes are pinned.
        """

    @abstractmethod
    def computed(self, request: Running, start: int) -> None:
        """Note that a request computed the tokens from `start` to `request.done`."""

    @abstractmethod
    def finish(self, request: Running) -> None:
        """Cache what is left of a finished request. Its node is still pinned."""

    @abstractmethod
    def touch(self, node: Node) -> None:
        """Note that a request resumes at a node."""

    def reserved(self, running: Sequence[Running]) -> int:
        """Return the tokens that requests have, or will have, outside of the tree."""
        return sum(request.total - self.unit * request.node.depth for request in running)

    def move(self, request: Running, node: Node) -> None:
        """Let a request read more of its units from the tree."""
        self.tree.pin(node, 1)
        self.tree.pin(request.node, -1)
        request.node = node

    def run(
        self,
        requests: Sequence[TracedRequest],
        concurrency: int,
        budget: int,
        finished: Callable[[int], None] | None = None,
    ) -> Tally:
        """Replay a trace and return its counters.

        Args:
            requests: The trace.
            concurrency: Requests in flight; the next is sent when one finishes.
            budget: Tokens that a step computes at most.
            finished: After a request finishes, gets the number of finished requests.

        Raises:
            ToolError: A request does not fit into the empty cache.
        """
        conversations = Conversations(requests)
        tally = self.tally
        tally.hits = [0] * len(requests)
        unsent = deque(range(len(requests)))
        queue: deque[Running] = deque()
        while unsent or queue or self.running:
            self.clock += 1
            while unsent and len(queue) + len(self.running) < concurrency:
                queue.append(self._send(unsent.popleft(), conversations))
            left = budget
            for request in self.running:
                if request.done >= request.prompt:
                    request.done += 1
                    left -= 1
                    self.computed(request, request.done - 1)
            for request in self.running:
                left = self._prefill(request, left)
            while queue and left > 0 and self._start(queue[0]):
                request = queue.popleft()
                tally.hits[request.index] = request.done
                left = self._prefill(request, left)
            if not self.running:
                request = queue[0]
                raise ToolError(
                    f"request {request.index + 1} of the trace has {request.total:,} tokens, more "
                    "than the whole cache holds; replay with more --memory"
                )
            tally.steps += 1
            for request in [one for one in self.running if one.done >= one.total]:
                self.finish(request)
                self.tree.pin(request.node, -1)
                self.running.remove(request)
                tally.requests += 1
                tally.prompt_tokens += request.prompt
                tally.hit_tokens += tally.hits[request.index]
                if finished is not None:
                    finished(tally.requests)
        return tally

    def _send(self, index: int, conversations: Conversations) -> Running:
        prompt, answer = conversations.tokens(index)
        tokens = tuple(prompt + answer)
        units = tuple(
            hash(tokens[start : start + self.unit])
            for start in range(0, len(tokens) - self.unit + 1, self.unit)
        )
        return Running(index, units, len(prompt), len(tokens), self.tree.root)

    def _start(self, request: Running) -> bool:
        # At least the last token of the prompt is computed.
        node, matched = self.tree.match(request.units[: (request.prompt - 1) // self.unit])
        request.node = node
        request.done = self.unit * node.depth
        request.branch = self.unit * matched if matched > node.depth else 0
        self.tree.pin(node, 1)
        self.touch(node)
        fits = self.make_room([*self.running, request])
        if fits:
            self.running.append(request)
        else:
            self.tree.pin(node, -1)
        return fits

    def _prefill(self, request: Running, budget: int) -> int:
        """Compute tokens of a prompt. Return the budget that is left."""
        count = min(budget, request.prompt - request.done)
        if request.done + count < request.prompt:
            # A part of a prompt ends with a unit, and uses the whole budget.
            count -= (request.done + count) % self.unit
            budget = max(count, 0)
        if count > 0:
            request.done += count
            self.computed(request, request.done - count)
            budget -= count
        return budget
