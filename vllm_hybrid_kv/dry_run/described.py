# SPDX-License-Identifier: Apache-2.0
"""A model as its config.json describes it, made ready to be planned."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "config.json"

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
"""Where models for more than text keep the configuration of their language model."""


class DescriptionError(ValueError):
    """A file does not describe a model that can be planned."""


@dataclass(frozen=True)
class Described:
    """A model that vLLM can build.

    Attributes:
        folder: Has the config.json that is planned.
        architecture: The class that vLLM builds.
        kv_cache_dtype: What the checkpoint says that `auto` means, by name; None if nothing.
        notes: What was changed of the description, a line each.
    """

    folder: str
    architecture: str
    kv_cache_dtype: str | None
    notes: tuple[str, ...]


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's configuration.

    Args:
        path: A config.json, under whatever name, or the folder of one.

    Raises:
        DescriptionError: There is none, or it is none.
    """
    file = path / CONFIG if path.is_dir() else path
    if not file.exists():
        where = f"folder {path} has no {CONFIG}" if path.is_dir() else f"no such file: {path}"
        raise DescriptionError(f"{where}; give a model's folder or its {CONFIG}")
    try:
        config = json.loads(file.read_text())
    except OSError as error:
        raise DescriptionError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise DescriptionError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DescriptionError(f"{file} is JSON and no model's configuration: not an object")
    architectures = config.get("architectures")
    if not (
        isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
    ):
        raise DescriptionError(f"{file} names no architecture: 'architectures' is missing or empty")
    if not isinstance(config.get("model_type"), str):
        raise DescriptionError(f"{file} names no model: 'model_type' is missing")
    return config


@contextmanager
def described(path: Path) -> Iterator[Described]:
    """Make a model's description ready: the language model alone, its weights not quantised.

    Neither changes the KV cache. Towers for images and sounds keep none, and building one wants a
    tokenizer and a processor. How weights are stored matters to the cache only where the checkpoint
    says how `auto` is to store keys and values, which is read first; kernels for it may not be
    there.

    Args:
        path: A config.json, under whatever name, or the folder of one.

    Raises:
        DescriptionError: It is no description, or of an architecture that vLLM does not know.
    """
    config = read_config(path)
    notes = []
    architecture = config["architectures"][0]
    _check_known(architecture, path)
    quantisation = config.pop("quantization_config", None) or {}
    text = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    if text is not None:
        text = dict(text)
        quantisation = text.pop("quantization_config", None) or quantisation
        wrapper, architecture = architecture, _text_architecture(architecture, text)
        for key in ("dtype", "torch_dtype", "tie_word_embeddings"):
            if key in config:
                text.setdefault(key, config[key])
        config = {**text, "architectures": [architecture]}
        notes.append(f"{wrapper} is planned as its language model, {architecture}")
    if quantisation:
        method = quantisation.get("quant_method", "quantised")
        notes.append(f"the weights' quantisation ({method}) is left out: the KV cache is the same")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(config))
        yield Described(folder, architecture, _stored_by(quantisation), tuple(notes))


def _check_known(architecture: str, path: Path) -> None:
    from vllm.model_executor.models import ModelRegistry

    if architecture not in ModelRegistry.get_supported_archs():
        raise DescriptionError(f"{path}: vLLM knows no architecture {architecture}")


def _text_architecture(wrapper: str, text: dict[str, Any]) -> str:
    """Return the class of vLLM's that a model for more than text has for its text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm.model_executor.models import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    candidates = (
        *(text.get("architectures") or ()),
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.get("model_type")),
        wrapper.replace("ForConditionalGeneration", "ForCausalLM"),
    )
    for candidate in candidates:
        if candidate in known and candidate != wrapper:
            return str(candidate)
    raise DescriptionError(
        f"{wrapper} is for more than text, and vLLM knows no class for its language model alone "
        f"(model_type {text.get('model_type')!r}); give a config.json of the language model"
    )


def _stored_by(quantisation: dict[str, Any]) -> str | None:
    from vllm.utils.torch_utils import get_kv_cache_quant_algo_string

    stored: str | None = get_kv_cache_quant_algo_string(quantisation) if quantisation else None
    return stored
