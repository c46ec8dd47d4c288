# SPDX-License-Identifier: Apache-2.0
import copy

import pytest

FACTS = {
    "entry_points": [{"name": "hybrid_kv", "value": "v.plugin:register", "package": "v 0.1.0"}],
    "vllm_plugins": None,
    "settings": [
        {"name": name, "value": value, "source": "default", "choices": []}
        for name, value in (
            ("prefix_match_unit", "auto"),
            ("cpu_isa", "auto"),
            ("boundary_layers", 0),
            ("unify_page_sizes", "min_waste"),
        )
    ],
    "torch": {"version": "2.13.0", "cuda": None, "hip": None},
    "cpu": {
        "paths": ["portable", "avx512_bf16", "amx"],
        "lacking": {"portable": [], "avx512_bf16": [], "amx": []},
        "numba": "0.65.0",
    },
    "vllm": {"version": "0.32.0", "folder": "/site/vllm"},
    "version": "0.32.0",
    "minor": [0, 32],
    "platform": {"device": "cpu", "cpu": True, "gpu": False},
    "plugins": [{"name": "hybrid_kv", "state": "loaded", "error": None}],
    "active": True,
    "left_alone": False,
    "foreign": [],
    "strategies": [],
    "isa": "amx",
    "patches": [
        {
            "name": "coordinator",
            **dict.fromkeys(("replaces", "why", "upstream", "until"), "a line"),
            "edits": [{"name": "vllm.a.f", "active": True, "why": []}],
        }
    ],
    "gpus": [],
}


@pytest.fixture
def facts():
    """What the checks record on a machine with a CPU if all is well."""
    return copy.deepcopy(FACTS)


@pytest.fixture
def gpu_facts(facts):
    """What they record on a machine with a GPU, capability 9.0."""
    gpu = {"name": "A GPU", "memory": 24 << 30, "capability": "9.0", "architecture": "gfx942"}
    return facts | {
        "platform": {"device": "cuda", "cpu": False, "gpu": True},
        "isa": None,
        "gpus": [gpu],
        "tile_sizes": {"9.0": {"served": True, "origin": "derived"}},
    }
