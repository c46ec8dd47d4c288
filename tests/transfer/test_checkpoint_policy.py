# SPDX-License-Identifier: Apache-2.0
"""Store, load and evict checkpoints in host memory, with vLLM's manager of host memory."""

from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager

from vllm_hybrid_kv.coordinator.checkpoints import CheckpointKind, Checkpoints
from vllm_hybrid_kv.transfer.checkpoint_policy import POLICY, CheckpointPolicy

STATES = (0, 2)
ATTENTION = 1
BLOCK = 1000
CONTEXT = ReqContext("test")


class Host:
    """Host memory for conversations whose turns share the blocks of their prefix."""

    def __init__(self, chunks):
        self.manager = CPUOffloadingManager(chunks, cache_policy=POLICY)
        self.policy = self.manager._policy
        assert isinstance(self.policy, CheckpointPolicy)
        self.policy.set_groups(STATES, BLOCK)
        self.device = Checkpoints(len(STATES), BLOCK)
        self.keys = {}

    def keys_of(self, chat, turn):
        """Return the keys of a checkpoint after `turn` whole blocks of a conversation."""
        ends = [f"{chat}/{block}".encode() for block in range(1, turn + 1)]
        states = [make_offload_key(ends[-1], group) for group in STATES]
        return ends[-1], states + [make_offload_key(end, ATTENTION) for end in ends]

    def store(self, chat, turn, age=0, complete=True):
        """Store a checkpoint of the device. Return whether there was room."""
        end, keys = self.keys_of(chat, turn)
        self.device.arrive([end], 1)
        blocks = [100 * chat + block for block in range(turn)]
        place = CheckpointKind.PROMPT
        checkpoint, _ = self.device.enter(end, BLOCK * turn, place, blocks, None)
        if checkpoint is None:
            checkpoint = self.device.pinned_at(end)
        output = self.manager.prepare_store(keys, CONTEXT)
        if output is None:
            return False
        self.policy.enter(checkpoint, age, keys)
        self.keys[end] = keys
        if complete:
            self.manager.complete_store(set(output.keys_to_store), CONTEXT)
        return True

    def check(self):
        manager, policy = self.manager, self.policy
        assert len(policy._evictable) == manager._num_evictable_cache_chunks
        assert policy._unpinned.keys() <= policy._evictable
        for checkpoint in policy.checkpoints.pinned:
            for key in self.keys[checkpoint.key]:
                assert policy.get(key) is not None
                assert key not in policy._unpinned
        pinned = {key for one in policy.checkpoints.pinned for key in self.keys[one.key]}
        assert policy._evictable - pinned == policy._unpinned.keys()


@given(st.randoms(use_true_random=False), st.integers(4, 40))
def test_a_pinned_checkpoint_is_whole_and_all_other_chunks_can_be_evicted(draw, chunks):
    host = Host(chunks)
    loading = []
    for _ in range(60):
        if loading and draw.random() < 0.4:
            host.manager.complete_load(loading.pop(), CONTEXT)
        elif host.policy.checkpoints.pinned and draw.random() < 0.3:
            end = draw.choice(host.policy.checkpoints.pinned).key
            host.manager.prepare_load(host.keys[end], CONTEXT)
            loading.append(host.keys[end])
        else:
            host.store(draw.randrange(6), draw.randint(1, 6), draw.randrange(50))
        host.check()


def test_the_checkpoint_that_is_worth_the_least_is_evicted_first():
    host = Host(12)
    assert host.store(chat=1, turn=4, age=900)
    assert host.store(chat=2, turn=4)
    assert host.store(chat=3, turn=4)
    old, recent, new = (host.keys_of(chat, 4)[0] for chat in (1, 2, 3))
    pinned_at = host.policy.checkpoints.pinned_at
    assert pinned_at(old) is None
    assert pinned_at(recent)
    assert pinned_at(new)


def test_chunks_of_an_evicted_checkpoint_stay_while_they_are_loaded():
    host = Host(6)
    host.store(chat=1, turn=4)
    _, keys = host.keys_of(1, 4)
    host.manager.prepare_load(keys, CONTEXT)
    assert not host.store(chat=2, turn=4)
    host.manager.complete_load(keys, CONTEXT)
    assert host.store(chat=2, turn=4)
    assert not any(host.policy.get(key) for key in keys)


def test_a_store_that_does_not_fit_changes_nothing():
    host = Host(6)
    host.store(chat=1, turn=4)
    before = dict(host.policy._chunks)
    assert not host.store(chat=1, turn=6)
    assert host.policy._chunks == before
    assert host.policy.checkpoints.pinned_at(host.keys_of(1, 4)[0])


def test_a_second_turn_stores_only_its_new_blocks():
    host = Host(20)
    host.store(chat=1, turn=4)
    host.store(chat=1, turn=5)
    # The second turn adds its states and one attention block.
    assert host.manager._num_allocated_chunks == 6 + 3


def test_a_reset_forgets_all_chunks():
    host = Host(8)
    host.store(chat=1, turn=4)
    host.manager.reset_cache()
    assert host.store(chat=1, turn=4)
    host.check()
