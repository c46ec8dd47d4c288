# SPDX-License-Identifier: Apache-2.0
"""Import the fixtures of `tests/plugin` that make engine configurations."""

from tests.plugin.conftest import (
    _no_settings_from_outside,
    log,
    make_config,
    model,
    pytest_configure,
)

__all__ = ["_no_settings_from_outside", "log", "make_config", "model", "pytest_configure"]
