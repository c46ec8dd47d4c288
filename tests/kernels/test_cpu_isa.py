# SPDX-License-Identifier: Apache-2.0
"""What a CPU lacks for a path says why it cannot run it."""

import pytest
import torch

from vllm_hybrid_kv.kernels.cpu import isa


@pytest.mark.parametrize("path", isa.available())
def test_for_a_path_that_runs_nothing_is_lacking(path):
    assert isa.lacking(path) == ()


def test_each_missing_instruction_is_named_for_the_paths_that_need_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    needed = {path: isa.lacking(path) for path in isa.ALL}
    assert needed[isa.PORTABLE] == ()
    assert "avx512_bf16" in needed[isa.AVX512_BF16]
    assert set(needed[isa.AVX512_BF16]) < set(needed[isa.AMX])
    everything = dict.fromkeys(needed[isa.AMX], True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: everything | {"amx_tile": False})
    assert isa.lacking(isa.AMX) == ("amx_tile",)
    assert isa.lacking(isa.AVX512_BF16) == ()
