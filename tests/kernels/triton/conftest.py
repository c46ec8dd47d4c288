# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from testing.triton.processes import Compiler, Interpreter

_compiler = Compiler()


def shares_files(config: pytest.Config) -> bool:
    """Say whether this is one of the processes of `pytest -n`, which do not know their tests."""
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Ask for what is compiled last, so that the other tests run while it is."""
    if not shares_files(config):
        items.sort(key=lambda item: item.path.name == "test_machine_code.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to compile what the selected tests will ask for, whichever test comes first."""
    if session.config.option.collectonly or shares_files(session.config):
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
