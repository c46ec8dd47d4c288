# SPDX-License-Identifier: Apache-2.0
"""Make an architecture's config.json, in a process that has imported vLLM."""

from __future__ import annotations

from typing import Any

from tests.zoo.architectures import architectures
from tests.zoo.language_models import LANGUAGE_MODELS, SAME_AS
from tests.zoo.models import SIZES


def configuration_of(architecture: str) -> tuple[dict[str, Any], str]:
    """Return the fields of an architecture's config.json, and a note on where they come from.

    Raises:
        LookupError: Neither `tests.zoo.models` nor transformers has this architecture.
    """
    if architecture in LANGUAGE_MODELS:
        return configuration_of(LANGUAGE_MODELS[architecture])
    base = SAME_AS.get(architecture, architecture)
    fields = SIZES.get(base)
    if fields is None:
        fields, source = _from_transformers(base)
    elif "transformers" in fields:
        more = {key: value for key, value in fields.items() if key != "transformers"}
        fields, source = _from_transformers(base, fields["transformers"])
        if isinstance(more.get("text_config"), dict):
            more["text_config"] = {**fields["text_config"], **more["text_config"]}
        fields |= more
    elif "vllm" in fields:
        fields, source = _from_vllm(fields)
    else:
        fields, source = dict(fields), "published sizes"
        _register(fields["model_type"])
    if not architectures()[architecture].multimodal and isinstance(fields.get("text_config"), dict):
        fields = dict(fields["text_config"])
    fields["architectures"] = [architecture]
    fields["dtype"] = "bfloat16"
    return fields, source


def _from_transformers(architecture: str, model_type: str | None = None) -> tuple[dict, str]:
    from transformers import CONFIG_MAPPING

    model_type = model_type or _model_type(architecture)
    config = CONFIG_MAPPING[model_type]()
    return _as_json(config, model_type), f"defaults of transformers' {type(config).__name__}"


def _model_type(architecture: str) -> str:
    from transformers.models.auto import modeling_auto

    if architecture == "GPT2LMHeadModel":
        return "gpt2"  # transformers lists a derived model first.
    for name, names in vars(modeling_auto).items():
        if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES"):
            for model_type, classes in names.items():
                if architecture in ([classes] if isinstance(classes, str) else classes):
                    return model_type
    raise LookupError(f"no configuration for {architecture}: add its sizes to tests/zoo/models.py")


def _from_vllm(fields: dict[str, Any]) -> tuple[dict, str]:
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    name = fields["vllm"]
    given = {key: value for key, value in fields.items() if key != "vllm"}
    if name == "muse_glimmer_text":
        _CONFIG_REGISTRY["muse_glimmer"]
    config = _CONFIG_REGISTRY[name](**given)
    _register(config.model_type, type(config))
    text = getattr(config, "text_config", None)
    if text is not None and not isinstance(text, dict):
        _register(text.model_type, type(text))
    return _as_json(config, name), f"defaults of vLLM's {type(config).__name__}"


def _as_json(config: Any, model_type: str) -> dict[str, Any]:
    """Return a configuration's fields; move a nested `text_config` to the top level."""
    fields = _plain(config.to_dict())
    thinker = fields.get("thinker_config") or fields
    if isinstance(thinker.get("text_config"), dict):
        fields["text_config"] = thinker["text_config"]
    fields.setdefault("model_type", model_type)
    return fields


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Remove the fields that do not describe the model, also from nested configurations."""
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in ("_name_or_path", "output_attentions", "transformers_version")
    }


def _register(model_type: str, config_class: Any = None) -> None:
    """Register a config class for a model type that neither transformers nor vLLM defines."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    if model_type in CONFIG_MAPPING or model_type in _CONFIG_REGISTRY:
        return

    class PlainConfig(PreTrainedConfig):
        def __init__(self, **fields: Any) -> None:
            if "block_configs" in fields:
                fields["block_configs"] = [_as_object(each) for each in fields["block_configs"]]
            if "decoder" in fields:
                fields["encoder"] = _as_object(fields["encoder"])
                fields["decoder"] = CONFIG_MAPPING["mbart"](**fields["decoder"])
            super().__init__(**fields)

    PlainConfig.model_type = model_type
    AutoConfig.register(model_type, config_class or PlainConfig)


class _Fields(dict):
    """A dict whose keys can be read as attributes, as from a nested config."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _as_object(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return _Fields({key: _as_object(each) for key, each in value.items()})
