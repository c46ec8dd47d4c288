# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from testing.triton.processes import Compiler, Interpreter

_compiler = Compiler()


def _is_xdist_worker(config: pytest.Config) -> bool:
    """Return whether this is a worker of `pytest -n`, which does not know its tests in advance."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the tests of compiled code last, because the compiler works during the other tests."""
    if not _is_xdist_worker(config):
        items.sort(key=lambda item: item.path.name.startswith("test_machine_code"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start to compile the `job` of every selected test, in the background."""
    if session.config.option.collectonly or _is_xdist_worker(session.config):
        return
    for item in session.items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            job = item.callspec.params.get("job")
            if job is not None:
                _compiler.start(job)


def pytest_sessionfinish() -> None:
    _compiler.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


@pytest.fixture(scope="session")
def compiler() -> Compiler:
    return _compiler
