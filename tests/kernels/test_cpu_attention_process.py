# SPDX-License-Identifier: Apache-2.0
"""What the CPU kernels do to the process they run in: instructions, threads, compiled code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vllm_hybrid_kv
from testing.kernels.cpu_processes import ATTEND, python, succeeded
from vllm_hybrid_kv import kernels
from vllm_hybrid_kv.kernels import k8v4
from vllm_hybrid_kv.kernels.cpu import drive, isa, paged_attention, plan_attention
from vllm_hybrid_kv.kernels.cpu.threads import follow_torch
from vllm_hybrid_kv.kernels.inputs import check_attention

BUILT_FOR_AVX2 = """
from vllm_hybrid_kv.kernels.cpu import isa
isa.available = lambda: (isa.PORTABLE,)
"""
"""What the kernels see on a CPU without AVX-512; LLVM is told so by `NUMBA_CPU_NAME`."""


def test_the_fastest_path_of_the_cpu_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.ENVIRONMENT, raising=False)
    assert isa.best_isa() == isa.available()[-1]
    assert isa.available()[0] == isa.PORTABLE
    assert isa.describe() == f"cpu:{isa.best_isa()}"


def test_auto_in_the_environment_asks_for_the_fastest_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isa.ENVIRONMENT, isa.AUTO)
    assert isa.best_isa() == isa.available()[-1]


def test_the_environment_chooses_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(isa.ENVIRONMENT, isa.PORTABLE)
    assert isa.best_isa() == isa.PORTABLE


def test_a_path_that_does_not_exist_is_refused_with_those_that_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(isa.ENVIRONMENT, "sse9")
    with pytest.raises(ValueError, match=r"'sse9'.*portable, avx512_bf16, amx"):
        isa.best_isa()


def test_a_path_that_the_cpu_lacks_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isa, "available", lambda: (isa.PORTABLE,))
    monkeypatch.setenv(isa.ENVIRONMENT, isa.AMX)
    with pytest.raises(ValueError, match=r"cannot run.*amx.*unset VLLM_HYBRID_KV_CPU_ISA"):
        isa.best_isa()


def test_a_cpu_without_the_byte_permute_keeps_to_the_portable_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = {**torch.cpu.get_capabilities(), "avx512_vbmi": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    isa.available.cache_clear()
    try:
        assert isa.available() == (isa.PORTABLE,)
    finally:
        monkeypatch.undo()
        isa.available.cache_clear()


def test_naming_the_path_loads_no_compiler() -> None:
    code = (
        "import sys; from vllm_hybrid_kv.kernels.cpu import isa; isa.describe();"
        "print('numba' in sys.modules)"
    )
    assert succeeded(python(code)).strip() == "False"


def test_the_number_of_threads_follows_torch_and_leaves_torch_alone() -> None:
    before = torch.get_num_threads()
    try:
        for wanted in (1, 2, 1):
            torch.set_num_threads(wanted)
            assert follow_torch() <= wanted
            assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


def test_a_process_of_one_thread_stays_one() -> None:
    count = "len(__import__('os').listdir('/proc/self/task'))"
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "import vllm_hybrid_kv.kernels.cpu.threads as threads, numba\n"
        "import numpy as np\n"
        "@numba.njit(parallel=True)\n"
        "def touch(x):\n"
        "    for i in numba.prange(8): x[i] = 1\n"
        f"before = {count}\n"
        "threads.follow_torch(); touch(np.zeros(8))\n"
        f"print({count} - before, torch.get_num_threads())"
    )
    assert succeeded(python(code)).split() == ["0", "1"]


def test_a_pinned_main_thread_does_not_shrink_the_pool() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import torch; torch.set_num_threads(os.cpu_count())\n"
        "from vllm_hybrid_kv.kernels.cpu.threads import follow_torch\n"
        "print(follow_torch() == os.cpu_count())"
    )
    environment = {"NUMBA_NUM_THREADS": ""} if "NUMBA_NUM_THREADS" in os.environ else {}
    code = "import os; os.environ.pop('NUMBA_NUM_THREADS', None)\n" + code
    assert succeeded(python(code, **environment)).strip() == "True"


def test_a_smaller_pool_of_an_earlier_numba_is_used_as_it_is() -> None:
    code = "import torch, numba; torch.set_num_threads(2)\n" + ATTEND
    succeeded(python(code, NUMBA_NUM_THREADS="1"))


def test_processes_that_compile_at_once_share_a_cache_and_a_damaged_one_is_survived(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ATTEND]
    together = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in together] == [0, 0]
    listed = "import os; print(sum(n.endswith('.nbi') for *_, f in os.walk(%r) for n in f))"
    assert int(succeeded(python(listed % str(tmp_path)))) > 0
    for file in tmp_path.rglob("*.nb?"):
        file.write_bytes(b"damaged")
    again = python(ATTEND, NUMBA_CACHE_DIR=str(tmp_path))
    succeeded(again)
    assert again.stderr.count("compiled in memory") == 1


def test_a_worker_bound_to_fewer_cores_keeps_its_number_of_threads() -> None:
    # As vLLM leaves torch in its workers: a number, and no way to change it.
    code = (
        "import torch; torch.set_num_threads(1); torch.set_num_threads = lambda count: None\n"
        + ATTEND
        + "print(torch.get_num_threads())"
    )
    assert succeeded(python(code)).strip() == "1"


def test_after_warm_up_nothing_is_left_to_compile() -> None:
    code = """
import numba.core.compiler as compiler, torch
from vllm_hybrid_kv.kernels.cpu import paged_attention, quantise_and_store, warm_up
torch.set_num_threads(2)
warm_up(64, torch.bfloat16)
compiled = []
compiler.compile_extra = lambda *arguments, **more: compiled.append(arguments)
key = torch.randn(300, 2, 64).bfloat16()
cache = torch.zeros(20, 2, 16, 100, dtype=torch.uint8)
slots = torch.arange(300)
for tokens in (1, 40, 300):
    quantise_and_store(key[:tokens], key[:tokens], cache, slots[:tokens])
table, length = torch.arange(20, dtype=torch.int32)[None], torch.tensor([300], dtype=torch.int32)
for tokens in (1, 3, 300):
    query = key[:tokens].repeat(1, 2, 1)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    paged_attention(query, cache, table, length, starts, torch.empty_like(query), scale=1.0)
assert not compiled, compiled
"""
    succeeded(python(code))


def test_kernels_run_where_nothing_can_be_written(tmp_path: Path) -> None:
    package = tmp_path / "vllm_hybrid_kv"
    skip = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(Path(vllm_hybrid_kv.__file__).parent, package, ignore=skip)
    source = Path(kernels.__file__).parent
    shutil.copytree(source, package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    # A file in the directory's place refuses even root.
    (package / "kernels" / "cpu" / "__pycache__").write_text("")
    result = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + ATTEND,
        NUMBA_CACHE_DIR="/proc/nowhere",
        XDG_CACHE_HOME="/proc/nowhere",
        HOME="/proc/nowhere",
        PYTHONDONTWRITEBYTECODE="1",
    )
    succeeded(result)
    assert result.stderr.count("compiled in memory") == 1


def tensors(head_size: int = 64) -> dict[str, torch.Tensor]:
    query = torch.zeros(3, 4, head_size)
    return {
        "query": query,
        "cache": torch.zeros(2, 2, 16, k8v4.slot_bytes(head_size), dtype=torch.uint8),
        "block_table": torch.zeros(2, 2, dtype=torch.int32),
        "seq_lens": torch.tensor([5, 20], dtype=torch.int32),
        "query_start_loc": torch.tensor([0, 1, 3], dtype=torch.int32),
        "out": torch.zeros_like(query),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", torch.zeros(3, 4, 64, dtype=torch.float64), "bf16, fp16 or fp32"),
        ("query", torch.zeros(3, 5, 64), "5 query heads are not a multiple of 2"),
        ("query", torch.zeros(3, 4, 128)[..., ::2], "dims of query and out must be contiguous"),
        ("cache", torch.zeros(2, 2, 16, 100), "cache must be uint8"),
        ("cache", torch.zeros(2, 2, 16, 99, dtype=torch.uint8), "head size 64 has 100 bytes"),
        ("cache", torch.zeros(2, 16, 2, 100, dtype=torch.uint8).transpose(1, 2), "contiguous"),
        ("out", torch.zeros(3, 4, 64, dtype=torch.bfloat16), "out must be like query"),
        ("seq_lens", torch.tensor([5, 20]), "seq_lens must be contiguous int32"),
        ("query_start_loc", torch.tensor([0, 3], dtype=torch.int32), r"contiguous int32 \[3\]"),
        ("block_table", torch.zeros(1, 2, dtype=torch.int32), "at least 2 rows"),
        ("sinks", torch.zeros(3), "sinks must hold 4 numbers"),
        ("lse", torch.zeros(3, 4, dtype=torch.float64), "lse must be float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_words(
    name: str, value: torch.Tensor, message: str
) -> None:
    arguments = {**tensors(), name: value}
    if name == "query" and value.dtype == torch.float32:
        arguments["out"] = torch.zeros(value.shape)
    with pytest.raises(ValueError, match=message):
        check_attention(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_table", torch.full((2, 2), 2, dtype=torch.int32), "block outside the cache's 2"),
        ("block_table", torch.full((2, 2), -1, dtype=torch.int32), "block outside the cache's 2"),
        ("seq_lens", torch.tensor([5, 33], dtype=torch.int32), "33 tokens needs 3 pages of 16"),
        ("query_start_loc", torch.tensor([0, 1, 4], dtype=torch.int32), "at most 3 query tokens"),
        ("query_start_loc", torch.tensor([0, 2, 1], dtype=torch.int32), "must rise"),
    ],
)
def test_indices_outside_the_tensors_are_refused_when_asked(
    name: str, value: torch.Tensor, message: str
) -> None:
    arguments = {**tensors(), name: value}
    check_attention(**arguments)
    with pytest.raises(ValueError, match=message):
        check_attention(**arguments, debug=True)


def test_a_plan_of_another_batch_is_refused() -> None:
    arguments = tensors()
    plan = plan_attention(arguments["seq_lens"], arguments["query_start_loc"], 8, 2, 64, 16)
    with pytest.raises(ValueError, match=r"the plan was made for .* 8, 2, 64"):
        paged_attention(**arguments, scale=1.0, plan=plan)  # type: ignore[arg-type]


def test_partial_sums_are_bounded_by_the_batch_and_the_threads_not_by_lengths() -> None:
    starts = torch.arange(9, dtype=torch.int32)
    for length in (4096, 1 << 20):
        lengths = torch.full((8,), length, dtype=torch.int32)
        plan = plan_attention(lengths, starts, 8, 2, 128, 128, num_threads=4)
        assert plan.partial_rows == 8 * 8 * 4  # requests, parts, rows
        assert plan.items.shape[0] == 8 * 8
    alone = plan_attention(lengths[:1], starts[:2], 8, 2, 128, 128, num_threads=1)
    assert alone.partial_rows == 0


@pytest.mark.parametrize(("threads", "rows"), [(2, 128), (64, 128), (65, 64), (96, 64)])
def test_a_prompt_has_blocks_of_more_rows_where_all_threads_have_work_all_the_same(
    threads: int, rows: int
) -> None:
    lengths, starts = torch.tensor([9000]), torch.tensor([0, 1024])
    plan = plan_attention(lengths, starts, 32, 4, 128, 128, num_threads=threads)
    assert plan.partial_rows == 0
    assert plan.items.shape[0] == 1024 * (32 // 4) // rows
    assert sorted(plan.items[:, drive.FIRST_ROW]) == list(range(0, 1024 * 8, rows))
    assert set(plan.items[:, drive.ROWS]) == {rows}


def test_the_portable_path_needs_no_instruction_beyond_avx2(tmp_path: Path) -> None:
    """LLVM ends the process where it has to call a library for an instruction that is not there."""
    environment = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    succeeded(python(BUILT_FOR_AVX2 + ATTEND, **environment))
