# SPDX-License-Identifier: Apache-2.0
"""Find and check a model's config.json, and reduce it to the model that `plan` builds."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from vllm_hybrid_kv.tools.options import in_tool_options, one_line
from vllm_hybrid_kv.tools.output import ToolError

GPU, CPU = DEVICES = ("gpu", "cpu")
"""Devices that an engine can be planned for."""

CONFIG = "config.json"

TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
"""Fields in which multimodal models have the configuration of their language model."""

TEXT_CLASSES = {
    "bailing_hybrid": "BailingMoeV3ForCausalLM",
    "diffusion_gemma_text": "Gemma4ForCausalLM",
    "emu3_text_model": "LlamaForCausalLM",
    "gemma4_unified_text": "Gemma4ForCausalLM",
    "glm4v_text": "Glm4ForCausalLM",
    "glm_ocr_text": "Glm4ForCausalLM",
    "minimax_m3_text": "MiniMaxM3SparseForCausalLM",
    "paddleocr_vl_text": "Ernie4_5ForCausalLM",
    "qwen2_5_omni_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3_omni_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
"""vLLM's class for language models whose `model_type` has no class in transformers."""

TRANSFORMERS = "TransformersForCausalLM"
"""vLLM's class for any language model that transformers has."""

ALSO_READ = "added_tokens.json"
"""A file that vLLM's class Dots3NoteForCausalLM reads."""

LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
"""Fields with the number of layers."""

MOST_LAYERS = 10_000
"""Models with more layers are rejected: none exist, and building them would take too long."""


class DescriptionError(ToolError):
    """A file does not describe a model that can be planned."""


@dataclass(frozen=True)
class ModelDescription:
    """A model that vLLM can build.

    Attributes:
        folder: The folder with the config.json to plan.
        architecture: The class that vLLM builds.
        kv_cache_dtype: The cache dtype that `auto` means for this checkpoint; None if the
            checkpoint names none.
        notes: One line for each change to the configuration.
    """

    folder: str
    architecture: str
    kv_cache_dtype: str | None
    notes: tuple[str, ...]

    def in_words(self, message: str) -> str:
        """Return a message with the architecture instead of the temporary folder."""
        return message.replace(self.folder, self.architecture)

    @contextmanager
    def errors_in_one_line(self) -> Iterator[None]:
        """Turn vLLM's errors about this model into a `ToolError` that advises options of tools."""
        try:
            yield
        except Exception as error:
            raise ToolError(in_tool_options(self.in_words(one_line(error)))) from error


def config_path(model: str, revision: str | None = None) -> Path:
    """Return the path of a model's configuration.

    Args:
        model: A folder, a config.json, or the name of a model in the local Hugging Face cache.
        revision: The hub's revision.

    Raises:
        DescriptionError: There is neither a path nor a cached model of that name.
    """
    path = Path(model)
    if model.count("/") != 1 or model.startswith((".", "/")) or os.path.exists(model):
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, CONFIG, revision=revision)
    except HFValidationError:
        cached = None
    if not isinstance(cached, str):
        raise DescriptionError(
            f"{model}: No such file or directory; and the local Hugging Face cache has no "
            f"{CONFIG} of a model of this name: hf download {model} {CONFIG}"
        )
    return Path(cached)


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's configuration from a file of any name, or from the config.json in a folder.

    Raises:
        DescriptionError: There is no file, or it does not describe a model.
    """
    file = path / CONFIG if os.path.isdir(path) else path
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise DescriptionError(
            f"{file}: {error.strerror}; give a model's folder or its {CONFIG}"
        ) from None
    except (ValueError, RecursionError) as error:
        # Invalid UTF-8 and numbers of thousands of digits are ValueErrors, too.
        raise DescriptionError(f"{file} is not JSON: {error}") from None
    match config:
        case {"architectures": [str(), *_], "model_type": str()}:
            return config
    raise DescriptionError(
        f"{file} does not describe a model: it needs 'architectures', a list of class names, and "
        "'model_type', a name"
    )


@contextmanager
def described(path: Path) -> Iterator[ModelDescription]:
    """Write a config.json for the language model with unquantised weights to a temporary folder.

    This does not change the KV cache. Encoders of images and sounds have no cache, and building
    them needs a tokenizer and a processor. Kernels for quantised weights may not exist on this
    machine. The quantisation can decide which cache dtype `auto` means, so read that dtype first.

    Args:
        path: As in `read_config`.

    Raises:
        DescriptionError: The file does not describe a model, or vLLM lacks its architecture.
    """
    config = read_config(path)
    notes = []
    architecture = config["architectures"][0]
    if architecture not in _known():
        raise DescriptionError(f"{path}: vLLM has no architecture {architecture}")
    quantisation = _pop_quantisation(config, path)
    part = next((config[key] for key in TEXT_CONFIGS if isinstance(config.get(key), dict)), None)
    if part is not None:
        quantisation = _pop_quantisation(part, path) or quantisation
        wrapper, architecture = architecture, _text_architecture(architecture, part)
        for key in ("dtype", "torch_dtype", "tie_word_embeddings"):
            if key in config:
                part.setdefault(key, config[key])
        config = {**part, "architectures": [architecture]}
        notes.append(f"{wrapper} is planned as its language model, {architecture}")
    for name in LAYER_COUNTS:
        count = config.get(name)
        if isinstance(count, int | float) and count > MOST_LAYERS:
            raise DescriptionError(
                f"{path}: {name!r} is {short(count)}; models of more than {MOST_LAYERS:,} layers "
                "are not planned"
            )
    if quantisation:
        method = quantisation.get("quant_method", "quantised")
        notes.append(f"quantised weights ({method}) are planned unquantised: the KV cache is equal")
    try:
        text = json.dumps(config)
    except RecursionError:
        raise DescriptionError(f"{path} is nested too deeply for a model's configuration") from None
    also_read = (path if path.is_dir() else path.parent) / ALSO_READ
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(text)
        if also_read.exists():
            shutil.copy(also_read, folder)
        yield ModelDescription(folder, architecture, _stored_by(quantisation, path), tuple(notes))


def _known() -> Collection[str]:
    from vllm.model_executor.models import ModelRegistry

    architectures: Collection[str] = ModelRegistry.get_supported_archs()
    return architectures


def _pop_quantisation(config: dict[str, Any], path: Path) -> dict[str, Any]:
    found = config.pop("quantization_config", None) or {}
    if not isinstance(found, dict):
        raise DescriptionError(
            f"{path}: 'quantization_config' must be an object, not {short(found)}; plan without it"
        )
    return found


def _text_architecture(wrapper: str, text: dict[str, Any]) -> str:
    """Return the class that vLLM has for the language model inside a multimodal model."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    known = _known()
    named, model_type = text.get("architectures"), text.get("model_type")
    model_type = model_type if isinstance(model_type, str) else ""
    candidates = (
        *(named if isinstance(named, list) else ()),
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type),
        TEXT_CLASSES.get(model_type),
        wrapper.replace("ForConditionalGeneration", "ForCausalLM"),
        TRANSFORMERS if model_type in MODEL_MAPPING_NAMES else None,
    )
    for candidate in candidates:
        if isinstance(candidate, str) and candidate in known and candidate != wrapper:
            return candidate
    raise DescriptionError(
        f"{wrapper} is multimodal, and vLLM has no class for its language model (model_type "
        f"{short(text.get('model_type'))}); give a config.json of the language model"
    )


def _stored_by(quantisation: dict[str, Any], path: Path) -> str | None:
    """Return the cache dtype that `auto` means for a quantised checkpoint, or None."""
    from vllm.utils.torch_utils import get_kv_cache_quant_algo_string

    scheme = quantisation.get("kv_cache_scheme")
    try:
        if scheme is not None and quantisation.get("quant_method") == "compressed-tensors":
            # A server's attention layers check the scheme, but layers built here do not get it.
            from vllm.model_executor.layers.quantization.compressed_tensors import (
                compressed_tensors,
            )

            compressed_tensors.CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(scheme)
            return "fp8"
        stored: str | None = get_kv_cache_quant_algo_string(quantisation) if quantisation else None
    except (AttributeError, TypeError, NotImplementedError, ValueError) as error:
        raise DescriptionError(f"{path}: 'quantization_config': {error}") from None
    return stored
