# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the plugin's tests.

Tests that depend on vLLM's version run twice: with the installed vLLM, and with the unpacked 0.33
wheel. For the latter, `test_vllm_0_33.py` starts a process with the variable `EXPECTED_MINOR`. That
wheel detects no device, so the process sets vLLM's platform to CPU.
"""

import inspect
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testing import processes
from testing.virtual_environments import distribution

EXPECTED_MINOR = "HYBRID_KV_TEST_VLLM_MINOR"
MAX_MODEL_LEN = 27_680


def pytest_configure() -> None:
    if EXPECTED_MINOR in os.environ:
        import vllm
        import vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        if not vllm.__version__.startswith(os.environ[EXPECTED_MINOR]):
            pytest.exit(f"this is vLLM {vllm.__version__} from {vllm.__file__}", returncode=4)
        vllm.platforms.current_platform = CpuPlatform()


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test without the plugin's variables, and without active settings."""
    for name in list(os.environ):
        if name.startswith("VLLM_HYBRID_KV_") or name == "VLLM_PLUGINS":
            monkeypatch.delenv(name)
    from vllm_hybrid_kv import plugin
    from vllm_hybrid_kv.state import STATE

    monkeypatch.setenv(plugin.PARENT_VARIABLE, "")
    monkeypatch.setattr(STATE, "engine_settings", None)


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


class Log(logging.Handler):
    """Records the plugin's log lines, because vLLM's loggers do not propagate to pytest's."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def lines(self, level: int) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno == level]


@pytest.fixture
def log() -> Iterator[Log]:
    handler = Log()
    logger = logging.getLogger("vllm.hybrid_kv")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Return a function that puts a package with an entry point for the plugin on `sys.path`."""
    added: list[str] = []

    def install(name: str, code: str) -> Path:
        folder, module = tmp_path / "site", f"{name}_kv"
        entry_points = f"[vllm_hybrid_kv]\n{name} = {module}\n"
        distribution(folder, f"{name}-kv", "1.5", entry_points, **{module: code})
        monkeypatch.syspath_prepend(str(folder))
        added.append(module)
        return folder

    yield install
    for module in added:
        sys.modules.pop(module, None)


@pytest.fixture(scope="session")
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs Python in a new process, without the plugin's variables."""

    def run(*arguments: str, timeout: float = 120, **environment: str) -> Any:
        environment = {"HF_HUB_OFFLINE": "1", **environment}
        command = [sys.executable, *arguments]
        return processes.run(
            command, timeout_s=timeout, without=("VLLM_HYBRID_KV_", "VLLM_PLUGINS"), **environment
        )

    return run


@pytest.fixture
def make_config(model: Path) -> Callable[..., Any]:
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
