# SPDX-License-Identifier: Apache-2.0
"""Fixtures that run the commands from this tree's wheel or inside the test process."""

import json
import logging
import os

import pytest
from typer.testing import CliRunner

from testing import virtual_environments
from vllm_hybrid_kv.tools.main import app


@pytest.fixture(scope="session")
def make_environment(unpacked_package, tmp_path_factory):
    """A function that makes virtual environments with this tree's wheel."""

    def make(**options):
        folder = tmp_path_factory.mktemp("environment")
        return virtual_environments.make(folder / "venv", unpacked_package, **options)

    return make


@pytest.fixture
def restored_environment():
    """Restores the environment and log level that a command changes in this process."""
    kept, level = dict(os.environ), logging.getLogger("vllm").level
    yield
    os.environ.clear()
    os.environ.update(kept)
    logging.getLogger("vllm").setLevel(level)


@pytest.fixture
def run(restored_environment):
    """A function that runs `plan` in this process, which has already imported vLLM."""
    return lambda *arguments: CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.fixture
def plan_of(run):
    """A function that runs `plan` for 24 GiB and returns the plan of its JSON."""

    def plan_of(*arguments):
        done = run("--memory", "24GiB", *arguments, "--json", "-")
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)["plan"]

    return plan_of
