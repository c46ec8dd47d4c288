# SPDX-License-Identifier: Apache-2.0
"""Parse the options of `plan` and `replay`, and turn vLLM's errors into one line."""

from __future__ import annotations

import argparse
import os
import re
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from vllm_hybrid_kv.constants import CACHE_DTYPE
from vllm_hybrid_kv.errors import did_you_mean
from vllm_hybrid_kv.hooks import HOOK_OF_SETTING, strategy_names
from vllm_hybrid_kv.settings import environment_name, resolve
from vllm_hybrid_kv.tools.output import ToolError, counted

_WITHOUT_EFFECT = re.compile(
    "model|tokenizer|quantization|load_format|model_loader_extra_config|skip_tokenizer_init|"
    "data_parallel_.*|distributed_executor_backend|gpu_memory_utilization|kv_cache_memory_bytes|"
    "nnodes|node_rank"
)
"""Fields about weights, tokenizers and processes. They do not change the KV cache of an engine."""

UNKNOWN = (
    "vLLM's class of this model does not build from this configuration; set "
    "VLLM_LOGGING_LEVEL=DEBUG to see where it fails"
)

_ADVICE = (
    (
        r"(?s)Try increasing `gpu_memory_utilization`.* or decreasing `max_model_len`.*",
        "Increase --memory or decrease --max-model-len.",
    ),
    (r"(?s)Try increasing `gpu_memory_utilization`.*", "Increase --memory."),
    (r"`?gpu_memory_utilization`?", "--memory"),
    (r"`?\bmax_model_len\b`?", "--max-model-len"),
    (r"(?i)\bset \w*unify_page_sizes=", "pass --unify "),
    (r"(?i)\bset \w*boundary_layers=", "pass --boundary-layers "),
    (r"\bset prefix_match_unit=", "set VLLM_HYBRID_KV_PREFIX_MATCH_UNIT="),
)
"""Patterns of vLLM's advice for servers, and the advice that `plan` and `replay` give instead."""


def memory_size(text: str, option: str = "--memory", least: int = 1) -> int:
    """Parse an option into bytes.

    K, M, G, T mean KiB, MiB, GiB, TiB, the powers of 1024; KB, MB, GB, TB are powers of 1000. A
    number without a unit is in bytes.

    Raises:
        ToolError: The text is not a size of at least `least` bytes.
    """
    binary = re.sub(r"([kmgt])\s*$", r"\1iB", text, flags=re.IGNORECASE)
    try:
        size = TypeAdapter(ByteSize).validate_python(binary)
    except (OverflowError, ValidationError):
        size = ByteSize(-1)
    if size < least:
        raise ToolError(
            f"{option}: {text!r} is not a size of at least {counted(least, 'byte')}; write it like "
            "20GiB, 512MiB or a number of bytes"
        )
    return int(size)


def check_strategy(option: str, setting: str, name: str) -> None:
    """Check that an option or a variable names a strategy, without importing vLLM.

    A strategy of another package is accepted for any setting, because only loading the strategy
    would show which hooks it implements.

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

    The variables of settings that were chosen by an option are removed, because the environment
    would override the command line.

    Raises:
        HybridKVError: A setting is not valid.
    """
    for name in by_option:
        os.environ.pop(environment_name(name), None)
    settings = resolve(None)
    for setting in HOOK_OF_SETTING:
        check_strategy(environment_name(setting), setting, getattr(settings, setting))


def parse(context: typer.Context, *more: str) -> tuple[str, dict[str, Any]]:
    """Parse `more`, followed by the `vllm serve` arguments that a command received.

    Returns:
        The model, and the arguments of `EngineArgs` that can change a plan.

    Raises:
        ToolError: vLLM's parser refuses the arguments, or they name no model.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    own = [option for parameter in context.command.params for option in parameter.opts]
    parser = _parser(own)
    try:
        given = parser.parse_args([*more, *context.args])
        model = given.model_tag
        if model is None and given.model != parser.get_default("model"):
            model = given.model
        # Hide the model's name, because vLLM in offline mode would look for its weights.
        given.model, given.tokenizer = ".", None
        engine = AsyncEngineArgs.from_cli_args(given)
    except (argparse.ArgumentTypeError, ValueError, OSError, AssertionError) as error:
        raise ToolError(str(error)) from None
    if model is None:
        raise ToolError("no model: give a folder, a config.json or a name on the hub first")
    return model, {
        field.name: getattr(engine, field.name)
        for field in fields(EngineArgs)
        if field.init and not _WITHOUT_EFFECT.fullmatch(field.name)
    }


def _parser(own_options: Sequence[str] = ()) -> argparse.ArgumentParser:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ModuleNotFoundError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
                options = (option for action in self._actions for option in action.option_strings)
                message += did_you_mean(unknown[1], [*own_options, *options])
            raise ToolError(message)

    parser: argparse.ArgumentParser = make_arg_parser(Parser(add_help=False))
    parser.set_defaults(kv_cache_dtype=CACHE_DTYPE)
    return parser


def in_tool_options(message: str) -> str:
    """Replace the advice in a server's message by options of `plan` and `replay`."""
    for pattern, option in _ADVICE:
        message = re.sub(pattern, option, message)
    return message


def one_line(error: Exception) -> str:
    """Return an error's message in one line, or `UNKNOWN` if vLLM did not write it for users."""
    if isinstance(error, ValidationError):
        message = "; ".join(
            ": ".join([*map(_option_of, map(str, fault["loc"])), fault["msg"]])
            for fault in error.errors()
        )
    else:
        message = _message_for_users(error) or UNKNOWN
        if message == UNKNOWN and os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            traceback.print_exception(error)
    return " ".join(message.replace("Value error, ", "").split())


def _option_of(field: str) -> str:
    """Return the option that sets a field of vLLM's configuration, or the field."""
    destination = {"cache_dtype": "kv_cache_dtype"}.get(field, field)
    for action in _parser()._actions:
        if action.dest == destination and action.option_strings:
            return next(option for option in action.option_strings if option.startswith("--"))
    return field


def _message_for_users(error: BaseException | None) -> str | None:
    """Return the first message in a chain of causes that vLLM wrote for users, or None."""
    from transformers import PreTrainedConfig

    if isinstance(error, ValueError | NotImplementedError | AssertionError | OSError):
        return str(error) or None
    if isinstance(error, AttributeError) and isinstance(error.obj, PreTrainedConfig):
        return (
            f"the configuration has no {error.name!r}, which vLLM's class of this model reads; "
            "add it to the config.json"
        )
    return _message_for_users(error.__cause__) if error is not None else None
