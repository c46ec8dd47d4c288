# SPDX-License-Identifier: Apache-2.0
"""Kernels are compiled in threads without being run, and are not compiled again when they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from triton import knobs

from testing.ptx.launch import PTXDevice
from testing.triton.attention import (
    DECODE,
    UNWRITTEN,
    Case,
    Outputs,
    assert_close,
    attend,
    expected,
    make,
    planned,
)  # fmt: skip
from vllm_hybrid_kv.kernels.triton.attend import attend_kernel
from vllm_hybrid_kv.kernels.triton.attention import merge_kernel
from vllm_hybrid_kv.kernels.triton.launching import compile_in_threads
from vllm_hybrid_kv.kernels.triton.plan import plan_kernel

KERNELS = (plan_kernel, attend_kernel, merge_kernel)
BATCH = make(Case(64, 4, 1, 16, **DECODE))


def run() -> Outputs:
    return attend(BATCH, planned(BATCH, split=True, processors=2))


def ignore(done: int, total: int) -> None:
    pass


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the names of the kernels that Triton compiles, starting with none compiled."""
    names: list[str] = []

    def note(**event: Any) -> None:
        names.append(event["fn"].name.rsplit(".", 1)[-1])

    for kernel in KERNELS:
        kernel.device_caches.clear()
    try:
        with patch.object(knobs.runtime, "jit_post_compile_hook", note):
            yield names
    finally:
        for kernel in KERNELS:
            kernel.device_caches.clear()


def test_kernels_that_threads_have_compiled_run_without_another_compilation() -> None:
    progress, outs, threads = [], [], set()

    def show(done: int, total: int) -> None:
        progress.append((done, total))
        threads.add(threading.get_ident())

    with PTXDevice(90) as device, compilations() as names:
        compile_in_threads(lambda: outs.append(run()), 3, show)
        assert sorted(names) == ["attend_kernel", "merge_kernel", "plan_kernel"]
        # Nothing has run yet.
        assert device.launches == []
        assert torch.equal(outs[0][0], torch.full_like(outs[0][0], UNWRITTEN))
        assert_close(run(), expected(BATCH))
        assert device.launches == ["plan_kernel", "attend_kernel", "merge_kernel"]
        assert len(names) == 3
    assert max(progress) == (3, 3)
    assert len(threads) > 1
    assert threading.get_ident() not in threads


def test_the_error_of_a_compiler_is_raised_and_later_launches_compile_as_usual() -> None:
    source = attend_kernel.src
    with PTXDevice(90), compilations() as names:
        attend_kernel._unsafe_update_src(source.replace("tl.num_programs(1)", "tl.no_such_name"))
        try:
            with pytest.raises(Exception, match="no_such_name"):
                compile_in_threads(run, 2, ignore)
        finally:
            attend_kernel._unsafe_update_src(source)
            attend_kernel.device_caches.clear()
        assert_close(run(), expected(BATCH))
        assert names.count("attend_kernel") == 1
