# SPDX-License-Identifier: Apache-2.0
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Modules of these tests alone.
sys.path.insert(0, str(Path(__file__).parent))

from processes import Compiler, Interpreter

_compiler = Compiler()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ask for what is compiled last, so that the other tests run while it is."""
    items.sort(key=lambda item: item.path.name == "test_machine_code.py")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to compile what the selected tests will ask for, whichever test comes first."""
    for item in session.items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            job = item.callspec.params.get("job")
            if job is not None and not session.config.option.collectonly:
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
