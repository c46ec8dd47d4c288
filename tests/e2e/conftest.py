# SPDX-License-Identifier: Apache-2.0
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testing.engine_host import EngineHost


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that builds each model of `testing.models` once, by name and dtype."""
    import torch

    from testing.models import CONFIGS, build_model

    folder = tmp_path_factory.mktemp("models")

    def build(name: str, dtype: str = "bfloat16") -> Path:
        path = folder / f"{name}-{dtype}"
        if not path.exists():
            build_model(CONFIGS[name](), path, getattr(torch, dtype))
        return path

    return build


@pytest.fixture(scope="session")
def session_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    with contextlib.closing(EngineHost(tmp_path_factory.mktemp("host") / "log.txt")) as host:
        yield host


@pytest.fixture(scope="module")
def host(session_host: EngineHost) -> Iterator[EngineHost]:
    """A process that runs the engines of all test modules, one after another."""
    yield session_host
    session_host.stop()


@pytest.fixture
def plant(host: EngineHost) -> Iterator[Callable[[str], None]]:
    """A function that plants a fault in the running engine until the test ends."""
    yield host.plant
    host.plant(None)


@pytest.fixture
def nobind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes of an engine share cores; by default, vLLM requires a core for each."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
