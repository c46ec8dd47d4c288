# SPDX-License-Identifier: Apache-2.0
"""Options of `vllm serve` in `plan` and `replay`: vLLM's own parser, and its errors in one line."""

from __future__ import annotations

import argparse
import os
import re
import traceback
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

import typer

from vllm_hybrid_kv.errors import did_you_mean
from vllm_hybrid_kv.tools.output import ToolError

DEFAULT_DTYPE = "turboquant_k8v4"

_WITHOUT_EFFECT = re.compile(
    "model|tokenizer|quantization|load_format|model_loader_extra_config|skip_tokenizer_init|"
    "data_parallel_.*|distributed_executor_backend|gpu_memory_utilization|kv_cache_memory_bytes|"
    "nnodes|node_rank"
)
"""Fields about weights, tokenizers and processes, which do not change the cache of one engine."""

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
"""Patterns in messages for servers, and the advice to users of `plan` and `replay`."""


def parse(context: typer.Context, *more: str) -> tuple[str, dict[str, Any]]:
    """Parse the arguments of `vllm serve` that a command received.

    Args:
        context: The command's context.
        more: Arguments before the received ones.

    Returns:
        The model, and arguments of `EngineArgs` without those that change no plan.

    Raises:
        ToolError: vLLM's parser refuses them, or none of them is a model.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    own = [option for parameter in context.command.params for option in parameter.opts]
    parser = _parser(own)
    try:
        given = parser.parse_args([*more, *context.args])
        model = given.model_tag
        if model is None and given.model != parser.get_default("model"):
            model = given.model
        # Offline, vLLM would look up the weights of the names here.
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
    parser.set_defaults(kv_cache_dtype=DEFAULT_DTYPE)
    return parser


def in_tool_options(message: str) -> str:
    """Return a message for servers with the options of `plan` and `replay` in its advice."""
    for pattern, option in _ADVICE:
        message = re.sub(pattern, option, message)
    return message


def one_line(error: Exception) -> str:
    """Return vLLM's message for users of an error in one line, or `UNKNOWN` if it has none."""
    from pydantic import ValidationError

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
    """Return the message of an error, or of its cause, whose class vLLM uses for users."""
    from transformers import PreTrainedConfig

    if isinstance(error, ValueError | NotImplementedError | AssertionError | OSError):
        return str(error) or None
    if isinstance(error, AttributeError) and isinstance(error.obj, PreTrainedConfig):
        return (
            f"the configuration has no {error.name!r}, which vLLM's class of this model reads; "
            "add it to the config.json"
        )
    return _message_for_users(error.__cause__) if error is not None else None
