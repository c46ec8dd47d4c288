# SPDX-License-Identifier: Apache-2.0
"""Fixtures of several folders, and how the tests run with a vLLM other than the installed one.

Tests that depend on vLLM's version run twice: with the installed vLLM, and with the unpacked 0.33
wheel. For the latter, `plugin/test_vllm_0_33.py` starts a process with the variable
`EXPECTED_MINOR`. That wheel detects no device, so the process sets vLLM's platform to CPU.
"""

import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The demo, the benchmarks and `testing` are not installed, so they are imported from the tree.
sys.path.insert(0, str(ROOT))

# vLLM and huggingface_hub read these variables on import. No test uses the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

# OpenMP reads this variable when torch is imported, here and in child processes. By default,
# waiting threads spin and occupy cores that threads with work need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

EXPECTED_MINOR = "HYBRID_KV_TEST_VLLM_MINOR"
MAX_MODEL_LEN = 27_680

SECONDS = {
    "kernels/triton/test_machine_code.py": 200,
    "e2e/test_greedy_output.py": 150,
    "conformance/test_conformance.py": 130,
    "drift/test_real_engines.py": 115,
    "e2e/test_demo.py": 110,
    "e2e/test_processes_and_compilation.py": 100,
    "benchmarks/test_prefix_cache.py": 90,
    "plugin/test_vllm_0_33.py": 85,
    "e2e/test_metrics.py": 50,
    "e2e/test_wrong_input.py": 65,
    "tools/test_doctor_command.py": 60,
    "kernels/test_cpu_attention_process.py": 90,
    "zoo/test_zoo.py": 50,
    "tools/test_plan_command.py": 50,
    "kernels/triton/test_attention.py": 50,
    "attention/test_cuda_graphs.py": 40,
    "tools/eval/test_engines.py": 45,
    "tools/test_replay_command.py": 60,
    "e2e/test_layers_and_pages.py": 60,
    "tools/plan/test_plan.py": 35,
}
"""How many CPU seconds the longest test files take, approximately."""


def pytest_configure() -> None:
    if EXPECTED_MINOR in os.environ:
        import vllm
        import vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        if not vllm.__version__.startswith(os.environ[EXPECTED_MINOR]):
            pytest.exit(f"this is vLLM {vllm.__version__} from {vllm.__file__}", returncode=4)
        vllm.platforms.current_platform = CpuPlatform()


def _seconds(item: pytest.Item) -> int:
    file = item.path.relative_to(ROOT / "tests").as_posix()
    return SECONDS.get(file, 30 if item.get_closest_marker("engine") else 0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the longest files first, so that the processes of `pytest -n` end together."""
    if hasattr(config, "workerinput"):
        missing = [file for file in SECONDS if not (ROOT / "tests" / file).is_file()]
        assert not missing, f"no such files: {missing}"
        items.sort(key=lambda item: -_seconds(item))


@pytest.fixture
def default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test without the plugin's variables, and without active settings."""
    from vllm_hybrid_kv import plugin
    from vllm_hybrid_kv.state import STATE

    for name in list(os.environ):
        if name.startswith("VLLM_HYBRID_KV_") or name == "VLLM_PLUGINS":
            monkeypatch.delenv(name)
    monkeypatch.setenv(plugin.PARENT_VARIABLE, "")
    monkeypatch.setattr(STATE, "engine_settings", None)


@pytest.fixture
def unregistered(default_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the test in a process without the plugin, and restore the process afterwards."""
    from vllm_hybrid_kv.patches import mechanism
    from vllm_hybrid_kv.state import STATE, ProcessState

    before = STATE.active_patches
    if before is not None:
        before.undo()
    saved = dict(vars(STATE))
    # prometheus_client keeps metrics until the process ends, so do not reset our metric fields.
    metrics = {name: saved[name] for name in ("metrics_files", "metrics_owner")}
    vars(STATE).update(vars(ProcessState(**metrics)))
    # If this module is imported, the plugin assumes the command `vllm` and exits on errors.
    monkeypatch.delitem(sys.modules, "vllm.entrypoints.cli.main", raising=False)
    yield
    active = STATE.active_patches
    # Undo the test's own patches first, because they would restore ours afterwards.
    monkeypatch.undo()
    if active is not None:
        active.undo()
    vars(STATE).update(saved)
    if before is not None:
        STATE.active_patches = mechanism.ActivePatches(before.patches)


@pytest.fixture
def log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., list[str]]]:
    """Return a function that returns the plugin's log lines, of one level or of all."""
    logger = logging.getLogger("vllm.hybrid_kv")
    # vLLM's loggers pass lines on to pytest's only until an engine sets them up.
    monkeypatch.setattr(logger, "propagate", False)
    with caplog.at_level(logging.DEBUG, logger.name):
        logger.addHandler(caplog.handler)
        yield lambda level=None: [
            message
            for name, of_line, message in caplog.record_tuples
            if name.startswith(logger.name) and level in (None, of_line)
        ]
        logger.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the config of a very small Llama, without weights or tokenizer. Returns its folder."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
        "max_position_embeddings": MAX_MODEL_LEN,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def make_config(default_settings: None, model: Path) -> Callable[..., Any]:
    """Return a function that makes real engine configurations from settings of the plugin."""

    def make(settings: dict[str, Any] | None = None, **arguments: Any) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        config = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            additional_config={} if settings is None else {"hybrid_kv": settings},
            **arguments,
        ).create_engine_config()
        # The engine core resolves the layout before it plans.
        config.cache_config.kv_cache_layout = "LBHNC"
        return config

    return make


@pytest.fixture(scope="session")
def stock() -> Callable[..., Any]:
    """Return vLLM's own rule that makes page sizes equal, even if it is patched."""
    try:
        from vllm.v1.core.kv_cache_planning import unify_kv_cache_spec_page_size
    except ModuleNotFoundError:
        from vllm.v1.core.kv_cache_utils import unify_kv_cache_spec_page_size
    return inspect.unwrap(unify_kv_cache_spec_page_size)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this tree."""
    # Build from a copy, because setuptools leaves a build folder and reuses its old files.
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("vllm_hybrid_kv", "kernels"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", built)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    (file,) = built.glob("*.whl")
    return file


@pytest.fixture(scope="session")
def unpacked_package(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder
