# SPDX-License-Identifier: Apache-2.0
"""Effects of the CPU kernels on their process: instruction sets, threads, compiled code."""

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
from testing.kernels.processes import ATTEND, output_of, python
from vllm_hybrid_kv import kernels
from vllm_hybrid_kv.kernels.cpu import isa
from vllm_hybrid_kv.kernels.cpu.attention import isa_for
from vllm_hybrid_kv.kernels.cpu.threads import follow_torch

WITHOUT_AVX512 = """
from vllm_hybrid_kv.kernels.cpu import isa
isa.available = lambda: (isa.PORTABLE,)
"""
"""Hide AVX-512 from the kernels; `NUMBA_CPU_NAME` hides it from LLVM."""

ROOM = "40k"
"""Enough for the indexes of the cache, too little for any compiled kernel."""


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bool]]:
    """Torch's CPU flags, to be changed before the first use."""
    flags = dict(torch.cpu.get_capabilities())
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    isa.available.cache_clear()
    yield flags
    isa.available.cache_clear()


def test_the_fastest_instruction_set_of_the_cpu_is_the_default() -> None:
    assert isa.available()[0] == isa.PORTABLE
    assert isa_for(torch.bfloat16, 128) == isa.available()[-1]
    assert isa_for(torch.bfloat16, 128, isa.PORTABLE) == isa.PORTABLE
    assert isa_for(torch.float16, 128) == isa_for(torch.bfloat16, 72) == isa.PORTABLE


def test_an_unknown_instruction_set_is_rejected_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sse9'.*portable, avx512_bf16, amx"):
        isa_for(torch.bfloat16, 128, "sse9")


def test_an_instruction_set_that_the_cpu_lacks_is_rejected(flags: dict[str, bool]) -> None:
    flags.update(dict.fromkeys(flags, False))
    with pytest.raises(ValueError, match=r"cannot run .*'amx': choose one of portable"):
        isa_for(torch.bfloat16, 128, isa.AMX)


def test_a_cpu_without_the_byte_permute_uses_the_portable_path(flags: dict[str, bool]) -> None:
    flags["avx512_vbmi"] = False
    assert isa.available() == (isa.PORTABLE,)


@pytest.mark.parametrize("name", isa.available())
def test_an_available_instruction_set_lacks_no_flag(name: str) -> None:
    assert isa.lacking(name) == ()


def test_each_missing_flag_is_named_for_the_instruction_sets_that_need_it(
    flags: dict[str, bool],
) -> None:
    flags.clear()
    needed = {name: isa.lacking(name) for name in isa.ALL}
    assert needed[isa.PORTABLE] == ()
    assert "avx512_bf16" in needed[isa.AVX512_BF16]
    assert set(needed[isa.AVX512_BF16]) < set(needed[isa.AMX])
    flags.update(dict.fromkeys(needed[isa.AMX], True), amx_tile=False)
    assert isa.lacking(isa.AMX) == ("amx_tile",)
    assert isa.lacking(isa.AVX512_BF16) == ()


def test_finding_the_instruction_sets_loads_no_compiler() -> None:
    code = (
        "import sys; from vllm_hybrid_kv.kernels.cpu import isa; isa.available();"
        "print('numba' in sys.modules)"
    )
    assert output_of(python(code)).strip() == "False"


def test_the_portable_path_needs_no_instruction_beyond_avx2(tmp_path: Path) -> None:
    """LLVM ends the process if it has to call a library for a missing instruction."""
    environment = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    output_of(python(WITHOUT_AVX512 + ATTEND, **environment))


@pytest.mark.skipif(isa.AVX512_BF16 not in isa.available(), reason="needs AVX-512 BF16")
def test_the_amx_path_equals_the_reference_with_emulated_tile_instructions(tmp_path: Path) -> None:
    code = "from testing.kernels import amx_emulator; amx_emulator.main()"
    output_of(python(code, NUMBA_CACHE_DIR=str(tmp_path)))


def test_numba_uses_as_many_threads_as_torch_and_leaves_torch_unchanged() -> None:
    before = torch.get_num_threads()
    try:
        for wanted in (1, 2, 1):
            torch.set_num_threads(wanted)
            assert follow_torch() <= wanted
            assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


def test_a_process_with_one_thread_starts_no_other() -> None:
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
    assert output_of(python(code)).split() == ["0", "1"]


def test_a_pinned_main_thread_does_not_shrink_the_pool() -> None:
    code = (
        "import os; os.environ.pop('NUMBA_NUM_THREADS', None)\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "import torch; torch.set_num_threads(os.cpu_count())\n"
        "from vllm_hybrid_kv.kernels.cpu.threads import follow_torch\n"
        "print(follow_torch() == os.cpu_count())"
    )
    assert output_of(python(code)).strip() == "True"


def test_a_smaller_pool_of_an_earlier_numba_import_is_used() -> None:
    code = "import torch, numba; torch.set_num_threads(2)\n" + ATTEND
    output_of(python(code, NUMBA_NUM_THREADS="1"))


def test_a_worker_bound_to_fewer_cores_keeps_its_number_of_threads() -> None:
    # vLLM's workers set the number and then replace the function with a no-op.
    code = (
        "import torch; torch.set_num_threads(1); torch.set_num_threads = lambda count: None\n"
        + ATTEND
        + "print(torch.get_num_threads())"
    )
    assert output_of(python(code)).strip() == "1"


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
    again = python(ATTEND, NUMBA_CACHE_DIR=str(tmp_path))
    output_of(again)
    assert again.stderr.count("compiled in memory") == 1


def test_one_kernel_serves_every_number_of_tokens_and_requests() -> None:
    code = """
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
    output_of(python(code))


def test_kernels_run_without_a_writable_directory(tmp_path: Path) -> None:
    package = tmp_path / "vllm_hybrid_kv"
    skip = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(Path(vllm_hybrid_kv.__file__).parent, package, ignore=skip)
    source = Path(kernels.__file__).parent
    shutil.copytree(source, package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    # A file instead of the directory stops even root.
    (package / "kernels" / "cpu" / "__pycache__").write_text("")
    result = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + ATTEND,
        NUMBA_CACHE_DIR="/proc/nowhere",
        XDG_CACHE_HOME="/proc/nowhere",
        HOME="/proc/nowhere",
        PYTHONDONTWRITEBYTECODE="1",
    )
    output_of(result)
    assert result.stderr.count("compiled in memory") == 1


def mount(*arguments: str) -> str:
    """Mount, and return the error message, empty if there is none."""
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if reason := mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(tmp_path)):
        pytest.skip(f"no disk can be mounted here: {reason}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_kernels_run_on_a_full_disk_and_are_cached_once_there_is_room(small_disk: Path) -> None:
    full = python(ATTEND, NUMBA_CACHE_DIR=str(small_disk))
    output_of(full)
    assert full.stderr.count("compiled in memory") == 1
    assert "No space left on device" in full.stderr
    assert "NUMBA_CACHE_DIR" in full.stderr
    assert not [file for file in small_disk.rglob("*") if ".tmp." in file.name]
    assert not mount("-o", "remount,size=64M", str(small_disk))
    for _ in range(2):
        again = python(ATTEND, NUMBA_CACHE_DIR=str(small_disk))
        output_of(again)
        assert again.stderr == ""
    assert list(small_disk.rglob("*.nbc"))
