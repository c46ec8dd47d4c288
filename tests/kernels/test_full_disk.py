# SPDX-License-Identifier: Apache-2.0
"""Kernels run where their cache has no room, and what was half written harms no later start."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.kernels.cpu_processes import ATTEND, python, succeeded

ROOM = "40k"
"""For the indexes of the cache, and for none of the compiled kernels that they name."""


def mount(*arguments: str) -> str:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, with little room."""
    if reason := mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(tmp_path)):
        pytest.skip(f"no disk can be mounted here: {reason}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_kernels_run_on_a_full_disk_and_are_kept_once_there_is_room(disk: Path) -> None:
    full = python(ATTEND, NUMBA_CACHE_DIR=str(disk))
    succeeded(full)
    assert full.stderr.count("compiled in memory") == 1
    assert "No space left on device" in full.stderr
    assert "NUMBA_CACHE_DIR" in full.stderr
    assert not [file for file in disk.rglob("*") if ".tmp." in file.name]
    assert not mount("-o", "remount,size=64M", str(disk))
    for _ in range(2):
        again = python(ATTEND, NUMBA_CACHE_DIR=str(disk))
        succeeded(again)
        assert again.stderr == ""
    assert list(disk.rglob("*.nbc"))
