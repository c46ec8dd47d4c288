# SPDX-License-Identifier: Apache-2.0
"""Faults planted in the kernels and their PTX are found: by the machine, or by a wrong result."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from testing.ptx import errors
from testing.ptx.launch import PTXDevice
from testing.triton import prefill
from testing.triton.attention import DECODE, Case, assert_close, attend, expected, make, planned
from testing.triton.store import differing_bytes, random_rows
from vllm_hybrid_kv.kernels.triton.attend import attend_kernel
from vllm_hybrid_kv.kernels.triton.attention import merge_kernel
from vllm_hybrid_kv.kernels.triton.quantise import quantise_and_store_kernel

CASE = Case(128, 8, 2, 16, **DECODE, plan={"split": True, "processors": 2})
WRONG = AssertionError
"""The outputs differ from the reference's."""


@dataclass(frozen=True)
class Fault:
    """A change of a kernel's text.

    Attributes:
        found: How it is found.
        pattern, replacement: What is changed in lines of the text, as for `re.sub`.
        which: The number of the change, if not all are made; negative from the end.
    """

    kernel: str
    found: type[Exception] | tuple[type[Exception], ...]
    pattern: str
    replacement: str
    which: int | None = None

    def plant(self, ptx: str) -> str:
        if f".entry {self.kernel}(" not in ptx:
            return ptx
        matches = list(re.finditer(self.pattern, ptx, re.M))
        if not matches:
            raise LookupError(f"nothing to change: {self.pattern}")
        chosen = matches if self.which is None else [matches[self.which]]
        for match in reversed(chosen):
            changed = match.expand(self.replacement)
            ptx = ptx[: match.start()] + changed + ptx[match.end() :]
        return ptx


_attend = partial(Fault, "attend_kernel")
_GROUP = r"\{ *([^{},]+), *([^{},]+), *([^{},]+), *([^{},]+) *\}"
_LAST_COPY = r"(cp\.async\.c[ag]\.shared\.global [^;]*);"

FAULTS: dict[str, Fault] = {
    # Asynchronous copies.
    "no wait for copies": _attend(
        errors.ReadBeforeWait, r"cp\.async\.wait_group\s+\d+;", ""
    ),
    "a wait that leaves a group pending": _attend(
        errors.ReadBeforeWait, r"cp\.async\.wait_group\s+0;", "cp.async.wait_group 1;"
    ),
    "copies that no group has": _attend(
        errors.ReadBeforeWait, r"cp\.async\.commit_group;", ""
    ),
    "no barrier after the wait": _attend(
        (errors.Race, errors.ReadBeforeWait),
        r"(cp\.async\.wait_group\s+0;(?:\s|//[^\n]*\n|\.loc[^\n]*\n)*)bar\.sync\s+0;", r"\1",
    ),
    "a copy of half of the bytes": _attend(
        (WRONG, errors.UninitialisedRead), r"(cp\.async\.cg[^;]*), 0x10, [^;]*;", r"\1, 0x10, 8;"
    ),
    "a copy to the address after": _attend(
        (errors.UninitialisedRead, errors.Race, errors.ReadBeforeWait, errors.OutOfBounds, WRONG),
        r"(cp\.async\.cg\.shared\.global \[ %r\d+) \+ 0", r"\1 + 16", 0,
    ),
    "a copy of 16 bytes from an address of 8": _attend(
        errors.Misaligned, r"(cp\.async\.cg[^;]*%rd\d+) \+ 0", r"\1 + 8", 0
    ),
    "copies of every lane, whatever its predicate": _attend(
        (errors.OutOfBounds, errors.Race, errors.ReadBeforeWait, WRONG),
        r"@%p\d+ (cp\.async\.ca)", r"\1",
    ),
    # Products.
    "swapped registers of a left operand of codes": _attend(
        WRONG, r"(mma\.sync\.\S*s8\S* *\{[^}]*\}, )" + _GROUP, r"\1{ \2, \4, \3, \5 }"
    ),
    "swapped registers of a right operand": _attend(
        WRONG, r"(mma\.sync\.\S*f16\S* *\{[^}]*\}, *\{[^}]*\}, )\{ *([^,}]+), *([^,}]+) *\}",
        r"\1{ \3, \2 }",
    ),
    "swapped accumulators": _attend(
        WRONG, r"(mma\.sync\.\S*f16\S*) *\{ (%r\d+), (%r\d+),", r"\1 { \3, \2,", 0
    ),
    "a product left out": _attend(WRONG, r"mma\.sync\.\S*s8[^;]*;", "", 0),
    "a matrix that is not transposed": _attend(
        WRONG, r"(ldmatrix\S*)\.trans(\S*)", r"\1\2", 0
    ),
    "a row of a matrix from the next one": _attend(
        (WRONG, errors.UninitialisedRead, errors.OutOfBounds, errors.Race),
        r"(ldmatrix[^;]*\[%r\d+)\]", r"\1+16]", 1,
    ),
    # Numbers.
    "a shuffle from the wrong lane": _attend(
        (WRONG, errors.Race), r"(shfl\.sync\.bfly\.b32[^;]*), 8, 31, -1", r"\1, 4, 31, -1"
    ),
    "a maximum that is a minimum": _attend(WRONG, r"\bmax\.f32", "min.f32", -1),
    "bytes in another order": _attend(WRONG, r"0x5410U", "0x5401U"),
    "a shift by one too many": _attend(
        (WRONG, errors.OutOfBounds), r"(shr\.u32[^;]*), 8;", r"\1, 9;"
    ),
    "a sum without its last addend": _attend(
        (WRONG, errors.UninitialisedRead), r"fma\.rn\.f32 [^;]*;", "", 5
    ),
    # Addresses and predicates.
    "a block of the table one later": _attend(
        (WRONG, errors.OutOfBounds), r"(ld\.global\.b32 \{ %r\d+ \}, \[ %rd\d+) \+ 0", r"\1 + 4", -1
    ),
    "outputs where there are none": _attend(
        (WRONG, errors.OutOfBounds, errors.Race), r"@(%p\d+) (st\.global\.v4)", r"@!\1 \2"
    ),
    "every lane stores": _attend(
        (errors.OutOfBounds, errors.Race, WRONG), r"@%p\d+ (st\.global\.v4)", r"\1"
    ),
    "outputs four bytes late": _attend(
        (errors.Misaligned, errors.OutOfBounds), r"(st\.global\.v4\.b32 \[ %rd\d+) \+ 0", r"\1 + 4"
    ),
    "shared memory of another lane": _attend(
        (errors.Race, errors.UninitialisedRead, errors.Misaligned, errors.OutOfBounds, WRONG),
        r"(st\.shared\.\S+\s+\[%r\d+)\]", r"\1+16]", 0,
    ),
    "a mask that is one token longer": _attend(WRONG, r"setp\.le\.s32", "setp.lt.s32"),
    # The other kernels.
    "no barriers between the tables": Fault(
        "plan_kernel", (errors.Race, errors.UninitialisedRead), r"bar\.sync\s+0;", ""
    ),
    "a prefix sum from the lane before the last": Fault(
        "plan_kernel", (WRONG, errors.PTXError),
        r"(shfl\.sync\.up\.b32[^;]*), 1, 0, -1", r"\1, 2, 0, -1",
    ),
    "lengths of the next request": Fault(
        "plan_kernel", (WRONG, errors.PTXError),
        r"(ld\.global\.b32 \{ %r\d+ \}, \[ %rd\d+) \+ 0", r"\1 + 4",
    ),
    "a part that is merged twice": Fault(
        "merge_kernel", (WRONG, errors.Race),
        r"(shfl\.sync\.bfly\.b32[^;]*), \d+, 31, -1", r"\1, 0, 31, -1",
    ),
    "parts of programs that do not exist": Fault(
        "merge_kernel", (errors.UninitialisedRead, errors.OutOfBounds, WRONG),
        r"@%p\d+ (ld\.global\.v4)", r"\1",
    ),
}  # fmt: skip


def check_attention() -> None:
    batch = make(CASE)
    assert_close(attend(batch, planned(batch, **(CASE.plan or {}))), expected(batch))


def check_storing() -> None:
    # The first token has the slot -1, which is none.
    slots = torch.arange(37) - 1
    assert differing_bytes(*random_rows(37, 3, 128, torch.bfloat16), slots) == 0


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str) -> None:
    fault = FAULTS[name]
    capability = (80, 120)[list(FAULTS).index(name) % 2]
    with (
        PTXDevice(capability, seed=1, edit=fault.plant) as device,
        pytest.raises(fault.found) as found,
    ):
        check_attention()
    assert fault.kernel in device.launches
    if isinstance(found.value, errors.PTXError):
        assert re.search(r"_kernel, line \d+: |global address", str(found.value))


STORE_FAULTS: dict[str, tuple[Callable[[str], str], type[Exception]]] = {
    "the scale of the neighbour": (
        lambda ptx: re.sub(r"(st\.global\.b16 \[ %rd\d+) \+ 0", r"\1 + 2", ptx),
        errors.Race,
    ),
    "a code rounded up": (lambda ptx: ptx.replace("0f4B400000", "0f4B400001"), WRONG),
    "a sum of lanes left out": (
        lambda ptx: re.sub(r"shfl\.sync\.bfly(.*), 1, 31, -1", r"shfl.sync.bfly\1, 0, 31, -1", ptx),
        errors.Race,
    ),
    "no barrier": (lambda ptx: re.sub(r"bar\.sync\s+0;", "", ptx), errors.PTXError),
    "rows after the last": (
        lambda ptx: re.sub(r"@%p\d+ (ld\.global)", r"\1", ptx), errors.OutOfBounds
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STORE_FAULTS)
def test_planted_faults_of_storing_are_found(name: str) -> None:
    plant, found = STORE_FAULTS[name]
    with PTXDevice(80, edit=plant), pytest.raises(found):
        check_storing()


PREFILL_FAULTS: dict[str, Fault] = {
    "codes rounded up": Fault("round_query_kernel", WRONG, r"0f4B400000", "0f4B400001"),
    "rows after the last": Fault(
        "round_query_kernel", errors.OutOfBounds, r"@%p\d+ (ld\.global)", r"\1"
    ),
    "a block of the table one later": Fault(
        "dequantise_kernel", (WRONG, errors.OutOfBounds),
        r"(@%p\d+ ld\.global\.b32 \{ %r\d+ \}, \[ %rd\d+) \+ 0", r"\1 + 4",
    ),
    "keys and values of tokens after the last": Fault(
        "dequantise_kernel", (errors.Race, errors.OutOfBounds, WRONG),
        r"@%p\d+ (st\.global)", r"\1",
    ),
    "no barriers in dequantising": Fault(
        "dequantise_kernel", (errors.Race, errors.UninitialisedRead), r"bar\.sync\s+0;", ""
    ),
    "a first broken token that is the last": Fault(
        "dequantise_kernel", WRONG, r"(atom\.\S+)\.min", r"\1.max"
    ),
    "every lane notes a broken token, in the wrong place": Fault(
        "dequantise_kernel", errors.OutOfBounds,
        r"@%p\d+ (atom\.global\.gpu\.acq_rel\.max\.s32 %r\d+, \[ %rd\d+) \+ 0", r"\1 + 4096",
    ),
    "the log-sum-exp of the next token": Fault(
        "merge_piece_kernel", (WRONG, errors.OutOfBounds),
        r"(@%p\d+ ld\.global\.b32 \{ %r\d+ \}, \[ %rd\d+) \+ 0", r"\1 + 4", 0,
    ),
    "no barriers in merging": Fault(
        "merge_piece_kernel", (errors.Race, errors.UninitialisedRead), r"bar\.sync\s+0;", ""
    ),
    "outputs after the last token": Fault(
        "merge_piece_kernel", (errors.OutOfBounds, errors.Race, WRONG),
        r"@%p\d+ (st\.global)", r"\1",
    ),
}  # fmt: skip


def check_prefill() -> None:
    # The second of three pieces has the broken token.
    batch = make(Case(96, 4, 2, 16, (150,), (20,), options={"sinks": torch.zeros(4)}))
    wanted = expected(batch)
    batch.scales(0, 1, "value")[100 // 16][100 % 16] = torch.inf
    out, lse = prefill.attend(batch, flash=prefill.visible_flash)
    # All 20 new tokens see it with the second half of the heads.
    assert out[:, 2:].isnan().all()
    got = (out[:, :2], lse[:, :2])
    prefill.assert_close(batch, got, (wanted[0][:, :2], wanted[1][:, :2]))


@pytest.mark.parametrize("name", PREFILL_FAULTS)
def test_planted_faults_of_long_prefills_are_found(name: str) -> None:
    fault = PREFILL_FAULTS[name]
    capability = (80, 120)[list(PREFILL_FAULTS).index(name) % 2]
    with (
        PTXDevice(capability, seed=1, edit=fault.plant) as device,
        pytest.raises(fault.found),
    ):
        check_prefill()
    assert fault.kernel in device.launches


SOURCE_FAULTS: dict[str, tuple[Any, str, str, type[Exception] | tuple[type[Exception], ...]]] = {
    "one row too many": (
        attend_kernel, "mask_m = row < query_len * GROUP", "mask_m = row <= query_len * GROUP",
        (errors.Race, errors.OutOfBounds, WRONG),
    ),
    "parts without weights": (merge_kernel, "part_out * p[:, None]", "part_out", WRONG),
    "padding that is stored": (
        quantise_and_store_kernel, "(slot >= 0)", "(slot >= -1)", errors.OutOfBounds
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCE_FAULTS)
def test_faults_planted_in_the_source_are_found(name: str) -> None:
    kernel, text, fault, found = SOURCE_FAULTS[name]
    source = kernel.src
    assert text in source
    kernel._unsafe_update_src(source.replace(text, fault))
    kernel.device_caches.clear()
    check = check_storing if kernel is quantise_and_store_kernel else check_attention
    try:
        with PTXDevice(80, seed=1), pytest.raises(found):
            check()
    finally:
        kernel._unsafe_update_src(source)
        kernel.device_caches.clear()


def test_without_a_fault_nothing_is_found() -> None:
    for capability in (80, 120):
        with PTXDevice(capability, seed=1):
            check_attention()
            check_prefill()
