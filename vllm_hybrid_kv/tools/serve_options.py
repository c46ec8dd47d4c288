# SPDX-License-Identifier: Apache-2.0
"""Options of `vllm serve` on other commands, parsed by vLLM's own parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from vllm_hybrid_kv.tools.plan.described import DescriptionError

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that takes options of `vllm serve`."""

DEFAULT_DTYPE = "turboquant_k8v4"

_WITHOUT_EFFECT = (
    # Weights, tokenizers and processes do not change the KV cache of one engine.
    "tokenizer",
    "quantization",
    "load_format",
    "model_loader_extra_config",
    "data_parallel_size",
    "data_parallel_rank",
    "data_parallel_start_rank",
    "data_parallel_size_local",
    "data_parallel_address",
    "data_parallel_rpc_port",
    "data_parallel_hybrid_lb",
    "data_parallel_external_lb",
    "distributed_executor_backend",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "nnodes",
    "node_rank",
    "skip_tokenizer_init",
)


class OptionError(ValueError):
    """vLLM's parser refuses an option; the message names it."""


def early_model(arguments: Sequence[str]) -> str | None:
    """Return the model if it can be told without vLLM's parser: first, or after `--model`."""
    if (model := _value_of("--model", arguments)) is not None:
        return model
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    return None


def check_config_file(arguments: Sequence[str]) -> None:
    """Check that the file of vLLM's `--config` is there.

    Raises:
        OptionError: It is not.
    """
    file = _value_of("--config", arguments)
    if file is not None and not Path(file).is_file():
        raise OptionError(f"--config: {file}: No such file")


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    for number, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == option:
            return value or (arguments[number + 1] if number + 1 < len(arguments) else None)
    return None


def config_path(model: str, revision: str | None = None) -> Path:
    """Return where the configuration of a model is: a path, or a hub name that is cached here.

    Args:
        model: A folder, a config.json, or a name on the Hugging Face hub.
        revision: The hub's revision.

    Raises:
        DescriptionError: There is neither a path nor a cached model of that name.
    """
    path = Path(model)
    try:
        here = path.exists()
    except OSError as error:
        raise DescriptionError(f"{model}: {error.strerror}") from None
    if here or model.count("/") != 1 or model.startswith((".", "/")):
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise DescriptionError(
            f"no such file: {model}; and the local Hugging Face cache has no config.json of a "
            f"model of this name: hf download {model} config.json"
        )
    return Path(cached).parent


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Parse what `vllm serve` would be given.

    Args:
        arguments: The model and options of `vllm serve`, in any order.

    Returns:
        The model, and arguments of `EngineArgs`, without those that change no plan.

    Raises:
        OptionError: vLLM's parser refuses them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    try:
        parser = _parser()
        given = parser.parse_args(list(arguments))
        model = given.model_tag or _given_model(parser, given)
        # Offline, vLLM would look for weights of the names here.
        given.model, given.tokenizer = ".", None
        engine = AsyncEngineArgs.from_cli_args(given)
    except (argparse.ArgumentTypeError, ValueError, OSError, AssertionError) as error:
        raise OptionError(str(error)) from None
    if model is None:
        raise OptionError("no model: give a folder, a config.json or a name on the hub first")
    return model, {
        field.name: getattr(engine, field.name)
        for field in fields(EngineArgs)
        if field.init and field.name not in (*_WITHOUT_EFFECT, "model")
    }


def option_of(field: str) -> str:
    """Return the option that sets a field of vLLM's configuration, as a user types it."""
    dest = {"cache_dtype": "kv_cache_dtype"}.get(field, field)
    for action in _parser()._actions:
        if action.dest == dest and action.option_strings:
            return next(o for o in action.option_strings if o.startswith("--"))
    return field


def _given_model(parser: argparse.ArgumentParser, given: argparse.Namespace) -> str | None:
    model: str | None = given.model
    return None if model == parser.get_default("model") else model


def _parser() -> argparse.ArgumentParser:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    except ModuleNotFoundError:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise OptionError(message)

    parser: argparse.ArgumentParser = make_arg_parser(Parser(add_help=False))
    parser.set_defaults(kv_cache_dtype=DEFAULT_DTYPE)
    return parser
