# SPDX-License-Identifier: Apache-2.0
"""Simulate how a worker writes and reads blocks, given only the scheduler's output."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.model_executor.layers.mamba.checkpoint import compute_mamba_prefill_checkpoints
from vllm.utils.math_utils import cdiv, round_down
from vllm.v1.kv_cache_interface import (
    MambaSpec,
)

from testing.coordinator.oracle import oldest_token
from tests.coordinator.soak.connector import Load
from tests.coordinator.soak.plans import Plan
from tests.coordinator.soak.prefixes import DRAFT, LOST, Prefixes

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class SoakError(AssertionError):
    """The simulated worker or a check found an inconsistency."""


class ChainedCopyError(SoakError):
    """In one step, two copies write the same block, or one reads a block that another writes."""


@dataclass
class KnownRequest:
    """A request as the worker knows it.

    Attributes:
        tables: Block ids by group.
        tokens: Its tokens, including outputs that the scheduler does not know yet.
        prefixes: For each token, the number of the prefix that ends with it.
        column: The block table column of the states written last, or None.
        accepted: Accepted draft tokens of the last step, plus one. The current state is
            `accepted - 1` columns after `column`.
        is_new: True from when it is scheduled or resumed until its first step.
    """

    tables: list[list[int]]
    tokens: list[int]
    prefixes: list[int]
    computed: int
    prompt_tokens: int
    column: int | None = None
    accepted: int = 1
    is_new: bool = True


class Worker:
    """A worker whose blocks hold numbers of prefixes instead of K, V and states.

    A block holds what any group wrote to it last. When a request runs, the worker
    checks everything that the next token needs: K and V of all positions that attention reaches,
    and the state after all earlier tokens.
    """

    def __init__(
        self,
        plan: Plan,
        prefixes: Prefixes,
        draw: random.Random,
        alignment: int,
        tally: Counter[str],
    ) -> None:
        self._tally = tally
        self._plan = plan
        self._alignment = alignment
        self._prefixes = prefixes
        self._draw = draw
        self._specs = plan.specs
        self._states = [i for i, spec in enumerate(self._specs) if isinstance(spec, MambaSpec)]
        self._attention = [i for i in range(len(self._specs)) if i not in self._states]
        self.draft_groups = {i for i, group in enumerate(plan.groups) if group.is_eagle_group}
        self.sequences: dict[str, KnownRequest] = {}
        # For each block, the group that wrote it last and its contents. A state is one entry.
        self.blocks: list[tuple[int, list[int | None]]] = [(-1, [])] * plan.num_blocks
        # For each block, how often it was written.
        self.versions = [0] * plan.num_blocks

    def write(self, group: int, block: int, offset: int, values: Sequence[int]) -> None:
        """Write K and V of some tokens, or a state, into a block."""
        if block == 0:
            raise SoakError(f"group {group} writes to the null block")
        spec = self._specs[group]
        owner, slots = self.blocks[block]
        if owner != group:
            slots = [None] * (1 if isinstance(spec, MambaSpec) else spec.block_size)
            self.blocks[block] = (group, slots)
        slots[offset : offset + len(values)] = values
        self.versions[block] += 1

    def differs(
        self, group: int, block: int, offset: int, values: Sequence[int]
    ) -> list[int | None] | None:
        """Compare a block with `values`. Returns None if they agree, otherwise its contents."""
        owner, slots = self.blocks[block]
        if owner != group:
            return [None] * len(values)
        found = slots[offset : offset + len(values)]
        if found == values:
            return None
        if group in self.draft_groups:
            # A draft layer's entry depends on the next token, which a hash that ends before it does
            # not cover. vLLM accepts wrong entries there, which only make drafts worse.
            unit = self._plan.unit
            wanted = zip(range(offset + 1, offset + 1 + len(values)), found, values, strict=True)
            if all(a == b for end, a, b in wanted if end % unit):
                return None
        return found

    def load(self, load: Load, failed: bool) -> None:
        """Write the contents of a load, or `LOST` if it failed."""
        prefixes: list[int] = []
        self._prefixes.extend(prefixes, load.request.all_token_ids)
        for group, table in enumerate(load.tables):
            if group in self._states:
                value = LOST if failed else prefixes[load.end - 1]
                block = table[cdiv(load.end, self._specs[group].block_size) - 1]
                self.write(group, block, 0, [value])
                continue
            shift = int(group in self.draft_groups)
            for block, position, offset, count in self._runs(group, table, load.start, load.end):
                if block:
                    values = list(prefixes[position + shift : position + shift + count])
                    self.write(group, block, offset, [LOST] * count if failed else values)

    def _runs(
        self, group: int, table: Sequence[int], start: int, end: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """Split tokens at block ends. Yields block id, first position, offset in block, count."""
        size = self._specs[group].block_size
        while start < end:
            count = min(end, (start // size + 1) * size) - start
            yield table[start // size], start, start % size, count
            start += count

    def receive(self, output: SchedulerOutput, lag: int) -> None:
        """Update the known requests from the scheduler's output, before the step runs."""
        for request_id in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
            self.sequences.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            tokens = list(new.prompt_token_ids)
            self._begin(new.req_id, new.block_ids, tokens, new.num_computed_tokens, len(tokens))
        cached = output.scheduled_cached_reqs
        for place, request_id in enumerate(cached.req_ids):
            blocks, computed = cached.new_block_ids[place], cached.num_computed_tokens[place]
            if request_id in cached.resumed_req_ids:
                tokens = list(cached.all_token_ids[request_id])
                prompt = len(tokens) - cached.num_output_tokens[place]
                self._begin(request_id, blocks, tokens, computed, prompt)
                continue
            sequence = self.sequences[request_id]
            for table, new_ids in zip(sequence.tables, blocks or (), strict=False):
                table.extend(new_ids)
            if not lag:
                # vLLM discards the output of a step with a failed load, so drop its tokens.
                known = sequence.prompt_tokens + cached.num_output_tokens[place]
                del sequence.tokens[known:], sequence.prefixes[known:]
                if sequence.computed != computed:
                    raise SoakError(f"{request_id}: {computed} computed, not {sequence.computed}")
                sequence.computed = computed

    def _begin(
        self,
        request_id: str,
        tables: Iterable[list[int]],
        tokens: list[int],
        computed: int,
        prompt_tokens: int,
    ) -> None:
        numbers: list[int] = []
        self._prefixes.extend(numbers, tokens)
        self.sequences[request_id] = KnownRequest(
            [list(table) for table in tables], tokens, numbers, computed, prompt_tokens
        )

    def run(self, output: SchedulerOutput) -> list[list[int]]:
        """Run a step, and return the new tokens of each request.

        Raises:
            SoakError: A block does not hold what a request needs.
        """
        self._copy(output)
        sampled = []
        chunks = {
            request_id: (sequence, sequence.computed, sequence.computed + count)
            for request_id, count in output.num_scheduled_tokens.items()
            for sequence in [self.sequences[request_id]]
        }
        self._check_states(chunks)
        for request_id, (sequence, start, end) in chunks.items():
            if sequence.is_new and start:
                self._tally.update({"hits": 1, "hit tokens": start})
            drafts = output.scheduled_spec_decode_tokens.get(request_id, [])
            sampled.append(self._compute(request_id, sequence, start, end, drafts))
            if not drafts and end - start > 1:
                self._write_exported(sequence, start, end)
        # A layer writes all K and V before any query attends to them.
        for request_id, (sequence, start, _) in chunks.items():
            self._check_attention(request_id, sequence, start)
        return sampled

    def _copy(self, output: SchedulerOutput) -> None:
        copies = output.kv_cache_block_copies or []
        targets = [copy.dst_block_id for copy in copies]
        sources = {copy.src_block_id for copy in copies}
        if len(set(targets)) != len(targets) or sources & set(targets):
            raise ChainedCopyError(f"copies overwrite each other: {copies}")
        for copy in copies:
            owner, slots = self.blocks[copy.src_block_id]
            self.blocks[copy.dst_block_id] = (owner, list(slots))
            self.versions[copy.dst_block_id] += 1

    def _source(self, group: int, sequence: KnownRequest, start: int) -> int:
        """Return the block with the state that a chunk continues from."""
        column = sequence.column
        if column is None:
            return sequence.tables[group][(start - 1) // self._specs[group].block_size]
        return sequence.tables[group][column + sequence.accepted - 1]

    def _check_states(self, chunks: dict[str, tuple[KnownRequest, int, int]]) -> None:
        if not self._states:
            return
        sources: dict[int, str] = {}
        for request_id, (sequence, start, _) in chunks.items():
            for group in self._states if start else ():
                block = self._source(group, sequence, start)
                wanted = sequence.prefixes[start - 1]
                found = self.differs(group, block, 0, [wanted])
                if found is not None:
                    raise SoakError(
                        f"{request_id}: block {block} should have group {group}'s state after "
                        f"{start} tokens, prefix {wanted}, but has prefix {found}"
                        f"{'; the block was a cache hit' * sequence.is_new}"
                    )
                sources[block] = request_id
        for request_id, (sequence, _, end) in chunks.items():
            for group in self._states:
                column = cdiv(end, self._specs[group].block_size) - 1
                block = sequence.tables[group][column]
                if sources.get(block, request_id) != request_id:
                    raise SoakError(f"{request_id} writes its state over {sources[block]}'s")

    def _compute(
        self, request_id: str, sequence: KnownRequest, start: int, end: int, drafts: Sequence[int]
    ) -> list[int]:
        """Write the results of a chunk, and return its sampled tokens."""
        certain = end - len(drafts)
        samples = certain == len(sequence.tokens)
        if certain > len(sequence.tokens) or (drafts and not samples):
            raise SoakError(f"{request_id} runs to {certain} of {len(sequence.tokens)} tokens")
        accepted = 0
        if drafts:
            if not sequence.is_new and (self._plan.lag or min(drafts) >= 0):
                accepted = self._draw.randint(0, len(drafts))
            # With asynchronous scheduling drafts are -1, because only the worker knows them.
            guess = [self._token() if token < 0 else token for token in drafts]
            sequence.tokens += guess
            self._prefixes.extend(sequence.prefixes, sequence.tokens)
        guessed = list(sequence.prefixes[:end])
        sampled: list[int] = []
        if samples:
            del sequence.tokens[certain + accepted :], sequence.prefixes[certain + accepted :]
            sequence.tokens.append(self._token())
            self._prefixes.extend(sequence.prefixes, sequence.tokens)
            sampled = sequence.tokens[certain:]
        self._write_attention(sequence, start, end, certain + accepted, guessed)
        self._write_states(sequence, certain, end, accepted, guessed)
        sequence.computed = certain + accepted
        sequence.is_new = False
        return sampled

    def _token(self) -> int:
        return self._draw.randrange(self._plan.vocabulary)

    def _write_attention(
        self, sequence: KnownRequest, start: int, end: int, kept: int, guessed: Sequence[int]
    ) -> None:
        for group in self._attention:
            table = sequence.tables[group]
            values = list(guessed)
            behind = end
            if group in self.draft_groups:
                # A draft layer's entry also depends on the next token.
                values = [*sequence.prefixes[1 : kept + 1], *[DRAFT] * (end - kept)]
                ahead = min(
                    self._plan.draft_tokens, len(table) * self._specs[group].block_size - end
                )
                if len(sequence.tokens) == kept + 1 and ahead > 0:
                    values += [DRAFT] * ahead
                    behind += ahead
            for block, position, offset, count in self._runs(group, table, start, behind):
                self.write(group, block, offset, values[position : position + count])

    def _write_states(
        self, sequence: KnownRequest, certain: int, end: int, accepted: int, guessed: Sequence[int]
    ) -> None:
        for group in self._states:
            table, size = sequence.tables[group], self._specs[group].block_size
            column = cdiv(end, size) - 1
            for place, length in enumerate(range(certain, end + 1)):
                self.write(group, table[column + place], 0, [guessed[length - 1]])
            reached = round_down(certain + accepted, size)
            sequence.column, sequence.accepted = column, accepted + 1
            if self._plan.draft_tokens and reached >= certain:
                # vLLM copies the state at the end of a block into that block.
                self.write(group, table[reached // size - 1], 0, [guessed[reached - 1]])
                if reached // size - 1 == column:
                    sequence.accepted = 1

    def _write_exported(self, sequence: KnownRequest, start: int, end: int) -> None:
        """Write the states that vLLM's backends export from within a chunk.

        A backend knows only the chunk, so it computes the position by the scheduler's rule.
        """
        for group in self._states:
            spec = self._specs[group]
            assert isinstance(spec, MambaSpec)
            if not spec.num_prefill_checkpoint_blocks:
                continue
            (offset,), (column,) = compute_mamba_prefill_checkpoints(
                [end],
                [end - start],
                hash_block_size=self._plan.unit,
                mamba_block_size=spec.block_size,
                checkpoint_alignment=spec.prefill_checkpoint_alignment,
                drop_eagle_block=self._plan.drafting == "mtp",
                cache_hit_alignment_tokens=self._alignment,
            )
            block = sequence.tables[group][column] if offset else 0
            if block:
                self.write(group, block, 0, [sequence.prefixes[start + offset - 1]])
                self._tally["states exported from within a chunk"] += 1

    def _check_attention(self, request_id: str, sequence: KnownRequest, start: int) -> None:
        for group in self._attention:
            values = sequence.prefixes[group in self.draft_groups :]
            first = oldest_token(self._specs[group], start)
            table = sequence.tables[group]
            for block, position, offset, count in self._runs(group, table, first, start):
                wanted = values[position : position + count]
                found = self.differs(group, block, offset, wanted)
                if found is not None:
                    raise SoakError(
                        f"{request_id}: group {group}'s block {block} does not hold tokens "
                        f"{position} to {position + count}, which the one at {start} needs "
                        f"(prefixes {wanted}, found {found})"
                    )
