# SPDX-License-Identifier: Apache-2.0
"""Options that `plan` and `replay` share, checked before vLLM is imported."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from pydantic import ByteSize, TypeAdapter, ValidationError

from vllm_hybrid_kv.errors import did_you_mean
from vllm_hybrid_kv.hooks import HOOK_OF_SETTING, strategy_names
from vllm_hybrid_kv.settings import environment_name, resolve
from vllm_hybrid_kv.tools.output import ToolError


def memory_size(text: str) -> int:
    """Return the bytes of the option `--memory`.

    Args:
        text: A number with a unit. K, M, G, T mean KiB, MiB, GiB, TiB, the powers of 1024; KB, MB,
            GB, TB are powers of 1000. A number without a unit is in bytes.

    Raises:
        ToolError: The text is not a size of at least one byte.
    """
    binary = re.sub(r"([kmgt])\s*$", r"\1iB", text, flags=re.IGNORECASE)
    try:
        size = TypeAdapter(ByteSize).validate_python(binary)
    except (OverflowError, ValidationError):
        size = ByteSize(0)
    if size < 1:
        raise ToolError(
            f"--memory: {text!r} is not a size of at least 1 byte; write it like 20GiB, 512MiB or "
            "a number of bytes"
        )
    return int(size)


def check_strategy(option: str, setting: str, name: str) -> None:
    """Check that an option names a strategy, without importing vLLM.

    A strategy of another package passes under any setting. Whether it implements the setting's hook
    is known only after it is loaded.

    Args:
        option: The option or environment variable.
        setting: The setting that the option chooses.
        name: The strategy's name.

    Raises:
        ToolError: No package has a strategy of this name.
    """
    names = strategy_names(setting)
    if name not in names:
        raise ToolError(
            f"{option}: {name!r} is not a strategy: choose {' or '.join(names)}"
            f"{did_you_mean(name, names)}"
        )


def check_environment(by_option: Iterable[str]) -> None:
    """Check the plugin's settings in the environment, without importing vLLM.

    Args:
        by_option: Settings chosen on the command line. Their environment variables are removed,
            because the environment would override the command line.

    Raises:
        HybridKVError: A setting is not valid.
    """
    for name in by_option:
        os.environ.pop(environment_name(name), None)
    settings = resolve(None)
    for setting in HOOK_OF_SETTING:
        check_strategy(environment_name(setting), setting, getattr(settings, setting))
