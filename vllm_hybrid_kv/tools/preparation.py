# SPDX-License-Identifier: Apache-2.0
"""What `plan` and `replay` do before they plan: check our settings, then import vLLM quietly."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable

from vllm_hybrid_kv.errors import HybridKVError
from vllm_hybrid_kv.hooks import HOOK_OF_SETTING, strategy_names
from vllm_hybrid_kv.settings import environment_name, resolve
from vllm_hybrid_kv.state import STATE
from vllm_hybrid_kv.tools.stopping import stop


def check_strategy(command: str, option: str, setting: str, name: str) -> None:
    """End a command whose option names no strategy, without importing vLLM.

    Strategies of other packages are known by name only: whether one fits the setting is found out
    when it is loaded.

    Args:
        command: The subcommand's name.
        option: What the user typed the name after.
        setting: The setting that the option chooses.
        name: The strategy's name.

    Raises:
        typer.Exit: No package has a strategy of that name.
    """
    names = strategy_names(setting)
    if name not in names:
        raise stop(command, f"{option}: {name!r} is not a strategy: choose {' or '.join(names)}")


def check_environment(command: str, by_option: Iterable[str]) -> None:
    """End a command with wrong settings in the environment, without importing vLLM.

    Args:
        command: The subcommand's name.
        by_option: Settings that are chosen on the command line; their variables are unset, as
            they would win.

    Raises:
        typer.Exit: A setting is not valid.
    """
    for name in by_option:
        os.environ.pop(environment_name(name), None)
    try:
        settings = resolve(None)
    except HybridKVError as error:
        raise stop(command, str(error)) from None
    for setting in HOOK_OF_SETTING:
        check_strategy(command, environment_name(setting), setting, getattr(settings, setting))


def prepare() -> None:
    """Import vLLM with the plugin active, and keep it from logging.

    Raises:
        HybridKVError: The plugin does not know this vLLM.
        ImportError: There is no vLLM.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from vllm_hybrid_kv.tools.plan.importing import import_vllm

    # Until vLLM has configured its logging, its messages go to the screen.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    import_vllm()
    from vllm_hybrid_kv import plugin

    plugin.register()
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    if STATE.active_patches is None:
        raise HybridKVError("the plugin is inactive because it does not know this vLLM")
