# SPDX-License-Identifier: Apache-2.0
"""Long prefills equal the reference, however they are divided.

Triton's kernels run in the interpreter. FlashAttention needs a GPU, so these tests pass a torch
implementation of it to the code that calls it (`testing/triton/flash_attention.py`).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from testing.triton import prefill
from testing.triton.attention import UNWRITTEN, Case, attend, expected, make
from testing.triton.flash_attention import flash_attn_varlen_func
from testing.triton.processes import interpreted
from vllm_hybrid_kv.kernels import k8v4, reference
from vllm_hybrid_kv.kernels.triton.prefill import (
    KEY_UNIT,
    PIECE_TOKENS,
    ROW_NUMBERS,
    VALUE_UNIT,
    Prefill,
    plan_prefill,
    prefill_workspace,
    rows_of_pass,
)

SINKS = torch.linspace(6, -3, 4)

CASES: dict[str, tuple[Case, dict[str, int]]] = {
    "one prompt in one piece": (Case(lengths=(60,), queries=(60,)), {}),
    "tokens in several blocks, keys in several pieces": (
        Case(lengths=(300,), queries=(140,), page_size=48, head_size=128), {"rows": 32}
    ),
    "requests that share a piece": (
        Case(lengths=(20, 31, 0, 13, 64), queries=(20, 9, 0, 13, 1), num_kv_heads=2), {}
    ),
    "requests of one and of several pieces": (
        Case(lengths=(20, 200, 30, 30), queries=(5, 70, 30, 2), num_heads=6, num_kv_heads=2,
             dtype=torch.float16), {"rows": 16}
    ),
    "a window in one piece": (Case(lengths=(60,), queries=(25,), options={"window": 10}), {}),
    # The first tokens of the second piece see tokens of the first one, the others do not.
    "a window across pieces": (
        Case(lengths=(150, 90), queries=(110, 90), options={"window": 30}), {"rows": 32}
    ),
    "a window of one token": (Case(lengths=(90,), queries=(70,), options={"window": 1}), {}),
    "a window longer than the prompt": (
        Case(lengths=(90,), queries=(70,), options={"window": 91}, dtype=torch.float32), {}
    ),
    "a soft cap": (
        Case(lengths=(90,), queries=(70,), head_size=256, options={"soft_cap": 2.0}), {}
    ),
    "sinks in one piece": (Case(lengths=(60,), queries=(25,), options={"sinks": SINKS}), {}),
    "sinks and several pieces": (
        Case(lengths=(200, 30), queries=(25, 30), options={"sinks": SINKS.bfloat16()}), {}
    ),
    "sinks of minus infinity": (
        Case(lengths=(70,), queries=(25,), options={"sinks": torch.full((4,), -math.inf)}), {}
    ),
    "everything": (
        Case(lengths=(200, 30), queries=(100, 30), head_size=72, num_heads=4, num_kv_heads=2,
             options={"window": 40, "soft_cap": 5.0, "sinks": SINKS}), {"rows": 16}
    ),
    "values of 1e-3": (Case(lengths=(90,), queries=(70,), value_size=1e-3), {}),
    "values of 6e3": (Case(lengths=(90,), queries=(70,), value_size=6e3, dtype=torch.float32), {}),
    "queries of 1e-3": (
        Case(lengths=(90,), queries=(70,), query_size=1e-3, options={"scale": 125.0}), {}
    ),
    "queries of 1e3": (
        Case(lengths=(90,), queries=(70,), query_size=1e3, options={"scale": 1.25e-4}), {}
    ),
    "large numbers after the last token": (
        Case(lengths=(70,), queries=(20,), unused=0x7B), {}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@interpreted
def test_long_prefills_equal_the_reference(name: str) -> None:
    case, sizes = CASES[name]
    batch = make(case)
    prefill.assert_close(batch, prefill.attend(batch, **sizes), expected(batch))


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129])
@interpreted
def test_tokens_around_the_end_of_a_piece_equal_the_reference(length: int) -> None:
    for queries in (1, 2, 64):
        batch = make(Case(lengths=(length,), queries=(min(queries, length),), num_heads=2))
        prefill.assert_close(batch, prefill.attend(batch, rows=32), expected(batch))


@interpreted
def test_rows_of_other_requests_are_not_written() -> None:
    batch = make(Case(lengths=(60, 9, 40, 70), queries=(30, 1, 20, 30)))
    one, _, _, last = prefill.prefills(batch)
    got = prefill.attend(batch, only=[one, last])
    written = torch.zeros(81, dtype=torch.bool)
    written[:30] = written[51:] = True
    for tensor in got:
        assert torch.equal(tensor == UNWRITTEN, ~written.view(-1, *[1] * (tensor.dim() - 1))
                           .expand_as(tensor))  # fmt: skip
    wanted = expected(batch)
    prefill.assert_close(
        batch, (got[0][written], got[1][written]), (wanted[0][written], wanted[1][written])
    )


@interpreted
def test_tokens_and_queries_reach_flash_attention_with_one_rounding_to_fp16() -> None:
    batch = make(Case(lengths=(61, 40), queries=(30, 7), num_heads=4, num_kv_heads=2))
    seen: list[dict[str, Any]] = []

    def recording(**arguments: Any) -> Any:
        seen.append({name: arguments[name].clone() for name in ("q", "k", "v")})
        return flash_attn_varlen_func(**arguments)

    prefill.attend(batch, flash=recording, piece=128)
    (call,) = seen
    stored = []
    for row, length in zip(batch.block_table.long(), (61, 40), strict=True):
        pages = batch.cache[row[: -(-length // 32)]]
        stored.append([one[:length] for one in reference.load(pages, 64, k8v4.Layout.LINEAR)])
    key_codes, value_codes, key_scale, value_scale = map(torch.cat, zip(*stored, strict=True))
    key = key_codes.float() * key_scale.float()[..., None]
    assert torch.equal(call["k"], (key * KEY_UNIT).half())
    value = (value_codes.float() - 7.5) * value_scale.float()[..., None]
    assert torch.equal(call["v"], (value * VALUE_UNIT).half())
    # Rotating the reference's query back and forth costs a few float32 roundings.
    query = reference.rotate(reference.round_query(batch.query))
    size = query.abs().amax(-1, keepdim=True)
    assert bool(((call["q"].float() - query).abs() <= query.abs() * 2**-11 + size * 1e-6).all())


def test_rounding_to_fp16_moves_a_key_by_less_than_half_a_step() -> None:
    scale = torch.arange(1, 0x7C00).to(torch.int16).view(torch.float16).float()[:, None]
    code = torch.arange(128).float()
    key = code * scale
    error = ((key * KEY_UNIT).half().float() / KEY_UNIT - key).abs()
    # The number of a key with the largest magnitude has the code 127.
    assert bool((error / (scale / 2) < 0.125)[scale[:, 0] >= 2**-6 / 127].all())
    assert bool((error < scale / 2)[scale[:, 0] >= 2**-9 / 127].all())
    assert float(error[scale[:, 0] < 2**-9 / 127].max()) <= 2**-17
    value = (torch.arange(16) - 7.5) * scale
    error = ((value * VALUE_UNIT).half().float() / VALUE_UNIT - value).abs()
    assert bool((error < scale / 2)[scale[:, 0] >= 2**-17 / 7.5].all())
    assert float(error[scale[:, 0] < 2**-17 / 7.5].max()) <= 2**-21


@interpreted
def test_the_largest_keys_and_values_stay_finite() -> None:
    batch = make(Case(lengths=(90,), queries=(40,), dtype=torch.float32, options={"scale": 1e-9}))
    generator = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 90, 1, 64, generator=generator)
    key[7], value[8], key[80, 0, 3] = k8v4.KEY_MAX, -math.inf, math.inf
    slots = batch.block_table[0].long()[torch.arange(90) // 32] * 32 + torch.arange(90) % 32
    reference.store(reference.quantise(key, value), batch.cache, slots, k8v4.Layout.LINEAR)
    prefill.assert_close(batch, prefill.attend(batch), expected(batch))


@interpreted
def test_queries_past_the_largest_fp16_number_attend_to_one_token() -> None:
    batch = make(Case(lengths=(90,), queries=(40,), dtype=torch.float32, query_size=1e6))
    out, _ = prefill.attend(batch)
    wanted, _ = expected(batch)
    assert float(((out - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()) < 1e-3


@interpreted
def test_a_query_that_is_not_finite_makes_its_own_row_nan() -> None:
    batch = make(Case(lengths=(90,), queries=(40,)))
    batch.query[5, 1, 3], batch.query[9, 2, 0] = math.nan, -math.inf
    broken = torch.zeros(40, 4, dtype=torch.bool)
    broken[5, 1] = broken[9, 2] = True
    out, _ = prefill.attend(batch)
    assert torch.equal(out.isnan().all(-1), broken)
    assert torch.equal(out.isnan().any(-1), broken)


@pytest.mark.parametrize("bits", [0x7E00, -0x1FF, 0x7C00, -0x400])
@pytest.mark.parametrize("plane", ["key", "value"])
@interpreted
def test_a_scale_that_is_not_finite_shows_in_the_rows_that_see_it_and_in_no_others(
    plane: str, bits: int
) -> None:
    # The 60 new tokens are at positions 120 to 179. Pieces start at 64 and 128.
    for options, token, seeing in (
        ({}, 20, range(60)),
        ({}, 150, range(30, 60)),
        ({"window": 6}, 150, range(30, 36)),
        ({"window": 6}, 126, range(6, 12)),
        ({"window": 6}, 114, range(0)),
    ):
        case = Case(lengths=(180, 54), queries=(60, 14), num_kv_heads=2, options=options)
        batch = make(case)
        wanted = expected(batch)
        batch.scales(0, 1, plane)[token // 32].view(torch.int16)[token % 32] = bits
        out, lse = prefill.attend(batch, rows=32)
        broken = torch.zeros(out.shape[:2], dtype=torch.bool)
        broken[seeing, 2:] = True
        assert torch.equal(out.isnan().all(-1), broken)
        assert torch.equal(out.isnan().any(-1), broken)
        seen = torch.where(broken, 0.0, lse)
        assert bool(seen.isfinite().all())
        prefill.assert_close(
            batch, (out[~broken], lse[~broken]), (wanted[0][~broken], wanted[1][~broken])
        )


@interpreted
def test_outputs_do_not_depend_on_chunks_or_on_the_path() -> None:
    """The differences are recorded in `benchmarks/results/gpu_prefill_notes.md`."""
    case = Case(lengths=(150,), queries=(150,), dtype=torch.float32, options={"sinks": SINKS})
    batch = make(case)
    whole = prefill.attend(batch)
    own = attend(batch)
    size = whole[0].norm(dim=-1)
    change = prefill.score_rounding(batch)
    for cuts in ([70], [64, 128], [1, 33, 149]):
        for start, end in itertools.pairwise([0, *cuts, 150]):
            chunk = make(case)
            chunk.query = batch.query[start:end]
            chunk.seq_lens = torch.tensor([end], dtype=torch.int32)
            chunk.query_start_loc = torch.tensor([0, end - start], dtype=torch.int32)
            out, lse = prefill.attend(chunk, rows=32)
            rows = slice(start, end)
            # Blocks of tokens differ, and with them the order of sums and where weights round.
            assert float(((out - whole[0][rows]).norm(dim=-1) / size[rows]).max()) < 2**-10
            assert float((lse - whole[1][rows]).abs().max()) < 1e-5
    assert float(((own[0] - whole[0]).norm(dim=-1) / size).max()) < change / 8 + 2**-10
    assert float((own[1] - whole[1]).abs().max()) < change


def test_every_plan_fits_the_workspace() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(100):
        heads, head_size = 2 ** random(0, 7), random(8, 33) * 8
        window = None if random(0, 2) else random(1, 3 * PIECE_TOKENS)
        batch, first = [], 0
        for request in range(random(1, 9)):
            count = random(1, 3000)
            batch.append(Prefill(request, first, count, count + random(0, 30000)))
            first += count + random(0, 2)
        plan = plan_prefill(batch, heads, head_size, torch.device("cpu"), window=window)
        (rows, *_), _ = prefill_workspace(heads, 1, head_size)[0]
        assert rows == rows_of_pass(heads, head_size)
        assert rows * heads * head_size <= ROW_NUMBERS < 2 * rows * heads * head_size or (
            rows == PIECE_TOKENS
        )
        planned = 0
        for one in plan.passes:
            tokens = one.tokens.stop - one.tokens.start
            planned += tokens
            assert tokens <= rows
            assert one.calls[0].num_tokens == tokens
            for call in one.calls:
                assert call.num_keys <= PIECE_TOKENS
                assert call.units.shape[0] == 1 or len(one.calls) == 1
                # The keys of a unit are in one piece.
                first_key, keys = call.units[:, 1], call.units[:, 2]
                assert bool((keys > 0).all())
                assert torch.equal(
                    first_key // PIECE_TOKENS, (first_key + keys - 1) // PIECE_TOKENS
                )
        assert planned == sum(one.num_tokens for one in batch)


def test_short_prompts_share_calls() -> None:
    batch = [Prefill(request, 200 * request, 200, 200 + 50 * request) for request in range(8)]
    plan = plan_prefill(batch, 32, 128, torch.device("cpu"))
    assert [len(one.calls) for one in plan.passes] == [1]
    assert plan.passes[0].calls[0].cu_seqlens_q.tolist() == list(range(0, 1601, 200))


@interpreted
def test_a_plan_for_another_window_is_refused() -> None:
    batch = make(Case(lengths=(60,), queries=(25,)))
    plan = plan_prefill(prefill.prefills(batch), 4, 64, batch.query.device, window=7)
    from vllm_hybrid_kv.kernels.triton.prefill import prefill_attention

    with pytest.raises(ValueError, match=r"\(4, 64, 7, True\), the call has \(4, 64, None, True\)"):
        prefill_attention(
            *batch.inputs, torch.empty_like(batch.query), plan=plan,
            flash=flash_attn_varlen_func, workspace=prefill.workspace(batch, 64, 64), scale=1.0,
        )  # fmt: skip
