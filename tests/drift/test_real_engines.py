# SPDX-License-Identifier: Apache-2.0
"""Real engines of vLLM 0.33 on a CPU: its Python files with the CPU extension of 0.32."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.adapter_suites import ENGINES, run_suites
from tests.conformance.releases import unpacked_wheel
from tests.drift.release import Release
from tests.drift.sources import Sources

OPERATOR = re.compile(r"torch\.ops\.(_C\w*)\.(\w+)")

# Modules, classes and functions that are only for CPUs have the word in their names.
FOR_CPUS = re.compile(r"(^|[._])cpu([._]|$)|^C(PU|pu)[A-Z]")

WRAPPERS = "vllm._custom_ops"
USES_OPERATORS = re.compile(r"_custom_ops|torch\.ops\._C")

MISSING = {
    # Mixture-of-experts layers with 8-bit weights; vLLM checks whether they exist.
    "_C.cpu_fused_moe_int8",
    "_C.prepack_moe_weight_int8",
    # Offloading to the memory of the host, from a GPU or an XPU.
    "_C.get_cuda_view_from_cpu_tensor",
    "_C.get_xpu_view_from_cpu_tensor",
    "_C.xpu_host_register",
    "_C.xpu_host_unregister",
    "_C_cache_ops.swap_blocks_batch",
}
"""Operators that the CPU code of 0.33 names and the extension of 0.32 lacks."""

REGISTERED = """
import json, sys, torch
from vllm.platforms import current_platform
current_platform.import_kernels()
names = (name.split(".") for name in json.load(sys.stdin))
print(json.dumps([hasattr(getattr(torch.ops, space), name) for space, name in names]))
"""


@pytest.fixture(scope="module")
def release() -> Release:
    """The unpacked 0.33, with a CPU extension."""
    folder = unpacked_wheel("0.33")
    assert folder is not None
    release = Release(folder)
    if not release.runs_on_cpu:
        pytest.fail(f"{folder} has no CPU extension: run `make {folder}/.cpu`", pytrace=False)
    return release


def for_cpus(sources: Sources) -> Iterator[ast.AST]:
    """Yield the modules, classes and functions for CPUs, where operators may be called."""
    for module in sources.files:
        if not USES_OPERATORS.search(sources.text(module)):
            continue
        if FOR_CPUS.search(module):
            yield sources.tree(module)
            continue
        for node in ast.walk(sources.tree(module)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and FOR_CPUS.search(node.name):
                yield node


def operators_for_cpus(sources: Sources) -> set[str]:
    """Return the operators that code for CPUs names, itself or through a wrapper."""
    nodes = list(for_cpus(sources))
    inside = [node for part in nodes for node in ast.walk(part)]
    wrapped = {
        node.attr
        for node in inside
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id.endswith("ops")
    }
    for node in inside:
        if isinstance(node, ast.ImportFrom) and node.module == WRAPPERS:
            wrapped |= {alias.name for alias in node.names}
    nodes += [
        node
        for node in sources.tree(WRAPPERS).body
        if isinstance(node, ast.FunctionDef) and node.name in wrapped
    ]
    return {".".join(pair) for node in nodes for pair in OPERATOR.findall(ast.unparse(node))}


def test_the_cpu_operators_of_0_33_that_the_extension_of_0_32_lacks_are_known(
    release: Release,
) -> None:
    named = sorted(operators_for_cpus(Sources(release.folder)))
    # Every engine calls the operators of attention.
    assert {"_C.cpu_attention_with_kv_cache", "_C.cpu_attn_reshape_and_cache"} <= set(named)
    done = subprocess.run(
        [sys.executable, "-c", REGISTERED],
        input=json.dumps(named),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    registered = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, there in zip(named, registered, strict=True) if not there} == MISSING


@pytest.mark.engine
def test_engines_of_0_33_answer_like_those_of_0_32(release: Release) -> None:
    done = run_suites([ENGINES], release.folder, "0.33")
    # A selection that selects fewer tests would pass as well.
    assert re.search(r"\b17 passed\b(?!.*skipped)", done.stdout), done.stdout[-8000:]
    assert done.returncode == 0
