# SPDX-License-Identifier: Apache-2.0
"""Blocks are copied whole, in whatever order vLLM lists the layers' views of them."""

import pytest
import torch
from vllm.v1.worker import utils

from vllm_hybrid_kv.coordinator.upstream_fixes import copy_whole_blocks, views_to_copy

BLOCKS, PAGE, STATE = 8, 64, 20
COPIES = [(2, 5)]


def memory(spare=0):
    """Make blocks with different contents, followed by spare bytes."""
    return (torch.arange(BLOCKS * PAGE + spare) % 251).to(torch.uint8)


def views(storage):
    """View blocks as states (shorter than a page) and as attention (2 kernel blocks per page)."""
    state = torch.as_strided(storage, (BLOCKS, STATE), (PAGE, 1)).view(torch.int8)
    attention = torch.as_strided(storage, (2 * BLOCKS, PAGE // 2), (PAGE // 2, 1))
    return state, attention


@pytest.fixture
def stock():
    # The plugin wraps vLLM's function, so take the original.
    return getattr(
        utils.copy_kv_cache_blocks_inplace, "__wrapped__", utils.copy_kv_cache_blocks_inplace
    )


@pytest.mark.parametrize("spare", [0, 16])
@pytest.mark.parametrize("first", ["state", "attention"])
def test_blocks_are_copied_whole_in_any_order_of_layers(stock, first, spare):
    storage = memory(spare)
    before = storage.clone()
    state, attention = views(storage)
    caches = [state, state, attention] if first == "state" else [attention, state, state]
    copy_whole_blocks(stock, caches, BLOCKS, COPIES)
    blocks, was = (every[: BLOCKS * PAGE].view(BLOCKS, PAGE) for every in (storage, before))
    assert torch.equal(blocks[5], was[2])
    others = [block for block in range(BLOCKS) if block != 5]
    assert torch.equal(blocks[others], was[others])
    assert torch.equal(storage[BLOCKS * PAGE :], before[BLOCKS * PAGE :])


def test_vllms_own_copy_omits_the_rest_of_an_attention_block(stock):
    storage = memory(spare=16)
    before = storage.clone()
    stock(views(storage), BLOCKS, COPIES)
    blocks, was = (every[: BLOCKS * PAGE].view(BLOCKS, PAGE) for every in (storage, before))
    assert torch.equal(blocks[5, :STATE], was[2, :STATE])
    # If this fails, vLLM copies whole blocks and the patch can be removed.
    assert torch.equal(blocks[5, STATE:], was[5, STATE:])


def test_equal_views_and_memory_of_blocks_only_are_copied_once():
    state, attention = views(memory())
    assert views_to_copy([state, attention, state], BLOCKS) == [[state]]
    state, attention = views(memory(spare=16))
    rounds = views_to_copy([state, state, attention, attention], BLOCKS)
    assert [len(caches) for caches in rounds] == [1, 1]
    assert rounds[0][0] is state
    assert rounds[1][0] is attention


def test_views_are_not_examined_without_copies(stock):
    copy_whole_blocks(stock, iter([None]), BLOCKS, [])
