# SPDX-License-Identifier: Apache-2.0
"""Kernels are compiled in threads without being run, and are not compiled again when they run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import triton
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
from vllm_hybrid_kv.attention import gpu
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

    # Each compilation waits until all three have begun.
    all_begun = threading.Barrier(3, timeout=60)

    def compile_together(*arguments: Any, **options: Any) -> Any:
        all_begun.wait()
        return compile_kernel(*arguments, **options)

    compile_kernel = triton.compiler.compile
    with PTXDevice(90) as device, compilations() as names:
        with patch.object(triton.compiler, "compile", compile_together):
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


def test_an_engine_shows_progress_only_if_kernels_are_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    with PTXDevice(90), compilations() as names:
        gpu.GpuKernels.compile_first(run)
        assert "Compiling k8v4 kernels: 100%" in (shown := capsys.readouterr().err)
        assert "3/3" in shown
        gpu.GpuKernels.compile_first(run)
        assert capsys.readouterr().err == ""
    assert len(names) == 3


def test_plans_of_layers_with_equal_shapes_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plans = Mock()
    monkeypatch.setattr(gpu.triton, "warm_up_plans", plans)
    monkeypatch.setattr(gpu.GpuKernels, "test", Mock())
    monkeypatch.setattr(torch.cuda, "get_device_name", Mock())
    shape = {"num_heads": 8, "num_kv_heads": 2, "head_size": 64}
    layers: Any = {
        name: SimpleNamespace(**shape, sliding_window=window)
        for name, window in (("0", None), ("1", 100), ("2", None))
    }
    gpu.GpuKernels(debug=False).warm_up(
        layers, SimpleNamespace(block_size=16), torch.bfloat16, torch.device("cuda"),
        max_requests=4, decode_query_len=1,
    )  # fmt: skip
    assert sorted(str(call.kwargs["window"]) for call in plans.call_args_list) == ["100", "None"]
