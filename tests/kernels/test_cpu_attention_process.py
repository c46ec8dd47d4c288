# SPDX-License-Identifier: Apache-2.0
"""How the CPU kernels behave in a process: instruction sets, threads, cache of compiled code."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vllm_hybrid_kv
from testing.processes import run
from vllm_hybrid_kv import kernels
from vllm_hybrid_kv.kernels.cpu import isa
from vllm_hybrid_kv.kernels.cpu.attention import isa_for
from vllm_hybrid_kv.kernels.cpu.threads import follow_torch

ATTEND = """
import torch
from vllm_hybrid_kv.kernels.cpu import paged_attention
query = torch.ones(1, 2, 64)
cache = torch.zeros(1, 1, 16, 100, dtype=torch.uint8)
cache[0, 0].view(-1)[16 * 96 + 32 : 16 * 96 + 64] = torch.tensor(
    [2.0] * 16, dtype=torch.float16).view(torch.uint8)
out = torch.zeros_like(query)
index = lambda *numbers: torch.tensor(numbers, dtype=torch.int32)
paged_attention(query, cache, index(0)[None], index(5), index(0, 1), out, scale=1.0, isa="portable")
assert ((out + 15.0).abs() < 1e-5).all(), out
"""
"""Code for a child process: attend to five tokens whose values are all -15 (code 0, scale 2)."""

STORE = """
from vllm_hybrid_kv.kernels import reference
from vllm_hybrid_kv.kernels.cpu import quantise_and_store
from vllm_hybrid_kv.kernels.k8v4 import Layout
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    key, value = torch.randn(2, 30, 1, 64).to(dtype)
    stored, expected = torch.zeros(2, 2, 1, 16, 100, dtype=torch.uint8)
    reference.store(reference.quantise(key, value), expected, torch.arange(30), Layout.CPU_TILED)
    quantise_and_store(key, value, stored, torch.arange(30))
    assert torch.equal(stored, expected), dtype
"""

COUNT_THREADS = """
import os, torch; torch.set_num_threads(1)
import vllm_hybrid_kv.kernels.cpu.threads as threads, numba
import numpy as np
@numba.njit(parallel=True)
def touch(x):
    for i in numba.prange(8): x[i] = 1
count = lambda: len(os.listdir('/proc/self/task'))
before = count()
threads.follow_torch(); touch(np.zeros(8))
assert (count(), torch.get_num_threads()) == (before, 1)
"""

CALL_WITH_SEVERAL_SIZES = """
import numba.core.compiler as compiler, torch
from vllm_hybrid_kv.kernels.cpu import paged_attention, quantise_and_store
torch.set_num_threads(2)
key = torch.randn(300, 2, 64).bfloat16()
cache = torch.zeros(20, 2, 16, 100, dtype=torch.uint8)
slots = torch.arange(300)
table, length = torch.arange(20, dtype=torch.int32)[None], torch.tensor([300], dtype=torch.int32)
def call(tokens, group):
    quantise_and_store(key[:tokens], key[:tokens], cache, slots[:tokens])
    query = key[:tokens].repeat(1, group, 1)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    paged_attention(query, cache, table, length, starts, torch.empty_like(query), scale=1.0)
for tokens in (1, 300):
    call(tokens, 1)
compiled = []
compiler.compile_extra = lambda *arguments, **more: compiled.append(arguments)
for tokens in (1, 3, 40, 300):
    call(tokens, 2)
assert not compiled, compiled
"""

ROOM = "40k"
"""Size of a disk that can hold the index files of Numba's cache, but no compiled kernel."""


def stderr_of(code: str, **environment: str | Path) -> str:
    """Run Python code in a child process that must succeed. Returns what it wrote to stderr."""
    changed = {name: str(value) for name, value in environment.items()}
    result = run([sys.executable, "-c", code], **changed)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """The CPU flags that torch reports. A test changes them before it calls functions of `isa`."""
    flags = dict(torch.cpu.get_capabilities())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    isa.available.cache_clear()
    yield flags
    isa.available.cache_clear()


def test_the_fastest_instruction_set_of_the_cpu_is_the_default() -> None:
    assert isa.available()[0] == isa.PORTABLE
    assert isa_for(128) == isa.available()[-1]
    assert isa_for(128, isa.PORTABLE) == isa_for(72, isa.PORTABLE) == isa.PORTABLE
    with pytest.raises(ValueError, match=r"'sse9'.*portable, avx512_vnni, amx"):
        isa_for(128, "sse9")


def test_amx_leaves_head_sizes_that_are_no_multiple_of_32_to_avx512_vnni(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(isa, "available", lambda: isa.ALL)
    assert [isa_for(size) for size in (64, 72, 96, 112, 512)] == [
        isa.AMX, isa.AVX512_VNNI, isa.AMX, isa.AVX512_VNNI, isa.AMX,
    ]  # fmt: skip


def test_an_instruction_set_that_the_cpu_lacks_is_rejected(flags: dict[str, bool]) -> None:
    flags["avx512_bw"] = False
    assert isa.available() == (isa.PORTABLE,)
    with pytest.raises(ValueError, match=r"cannot run .*'amx': choose one of portable"):
        isa_for(128, isa.AMX)


def test_each_missing_flag_is_named_for_the_instruction_sets_that_need_it(
    flags: dict[str, bool],
) -> None:
    flags.clear()
    needed = {name: isa.lacking(name) for name in isa.ALL}
    assert needed[isa.PORTABLE] == ()
    assert "avx512_vnni" in needed[isa.AVX512_VNNI]
    assert set(needed[isa.AVX512_VNNI]) < set(needed[isa.AMX])
    flags.update(dict.fromkeys(needed[isa.AMX], True), amx_tile=False)
    assert isa.lacking(isa.AMX) == ("amx_tile",)
    assert isa.lacking(isa.AVX512_VNNI) == ()


@pytest.mark.skipif(isa.AVX512_VNNI not in isa.available(), reason="needs AVX-512 VNNI")
def test_the_amx_path_equals_the_reference_with_emulated_tile_instructions(tmp_path: Path) -> None:
    code = "from testing.kernels import amx_emulator; amx_emulator.main()"
    stderr_of(code, NUMBA_CACHE_DIR=tmp_path)


def test_the_portable_kernels_need_no_instruction_beyond_avx2(tmp_path: Path) -> None:
    """Compile for AVX2. Other instructions would call a missing library, which ends Python."""
    features = "+avx2,+fma,+f16c"
    environment = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    stderr_of(ATTEND + STORE, **environment, NUMBA_CACHE_DIR=tmp_path)


def test_numba_uses_as_many_threads_as_torch_and_leaves_torch_unchanged() -> None:
    before = torch.get_num_threads()
    try:
        for wanted in (1, 2, 1):
            torch.set_num_threads(wanted)
            assert follow_torch() <= wanted
            assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("code", "environment"),
    [
        pytest.param(
            "import sys; from vllm_hybrid_kv.kernels.cpu import isa; isa.available()\n"
            "assert 'numba' not in sys.modules",
            {},
            id="finding the instruction sets loads no compiler",
        ),
        pytest.param(COUNT_THREADS, {}, id="one thread of torch starts no other"),
        pytest.param(
            "import os; os.environ.pop('NUMBA_NUM_THREADS', None)\n"
            "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "import torch; torch.set_num_threads(os.cpu_count())\n"
            "from vllm_hybrid_kv.kernels.cpu.threads import follow_torch\n"
            "assert follow_torch() == os.cpu_count()",
            {},
            id="a pinned main thread does not shrink the pool",
        ),
        pytest.param(
            "import torch, numba; torch.set_num_threads(2)\n" + ATTEND,
            {"NUMBA_NUM_THREADS": "1"},
            id="a smaller pool of an earlier import of numba is used",
        ),
        pytest.param(
            # vLLM's workers set the number of threads, then replace `set_num_threads` by a no-op.
            "import torch; torch.set_num_threads(1); torch.set_num_threads = lambda count: None\n"
            + ATTEND
            + "assert torch.get_num_threads() == 1",
            {},
            id="a worker bound to fewer cores keeps its number of threads",
        ),
        pytest.param(CALL_WITH_SEVERAL_SIZES, {}, id="one kernel serves every number of tokens"),
    ],
)
def test_a_fresh_process(code: str, environment: dict[str, str]) -> None:
    stderr_of(code, **environment)


def test_processes_that_compile_at_once_share_a_cache_and_survive_a_damaged_one(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", ATTEND]
    together = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in together] == [0, 0]
    assert list(tmp_path.rglob("*.nbi"))
    for file in tmp_path.rglob("*.nb?"):
        file.write_bytes(b"damaged")
    assert stderr_of(ATTEND, NUMBA_CACHE_DIR=tmp_path).count("compiled in memory") == 1


def test_kernels_run_without_a_writable_directory(tmp_path: Path) -> None:
    package = tmp_path / "vllm_hybrid_kv"
    skip = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(Path(vllm_hybrid_kv.__file__).parent, package, ignore=skip)
    source = Path(kernels.__file__).parent
    shutil.copytree(source, package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    # Put a file where Numba would create its cache directory, because that stops even root.
    (package / "kernels" / "cpu" / "__pycache__").write_text("")
    nowhere = dict.fromkeys(("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"), "/proc/nowhere")
    stderr = stderr_of(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + ATTEND,
        PYTHONDONTWRITEBYTECODE="1",
        **nowhere,
    )
    assert stderr.count("compiled in memory") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_kernels_run_on_a_full_disk_and_are_cached_once_there_is_room(small_disk: Path) -> None:
    stderr = stderr_of(ATTEND, NUMBA_CACHE_DIR=small_disk)
    assert stderr.count("compiled in memory") == 1
    assert "No space left on device" in stderr
    assert "NUMBA_CACHE_DIR" in stderr
    assert not [file for file in small_disk.rglob("*") if ".tmp." in file.name]
    subprocess.run(["mount", "-o", "remount,size=64M", str(small_disk)], check=True)
    for _ in range(2):
        assert stderr_of(ATTEND, NUMBA_CACHE_DIR=small_disk) == ""
    assert list(small_disk.rglob("*.nbc"))
