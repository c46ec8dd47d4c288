# SPDX-License-Identifier: Apache-2.0
"""The fixtures of `tests/plugin` that plan with real engine configurations."""

from tests.plugin.conftest import (
    _no_settings_from_outside,
    log,
    make_config,
    model,
    pytest_configure,
    stock,
)

__all__ = ["_no_settings_from_outside", "log", "make_config", "model", "pytest_configure", "stock"]
