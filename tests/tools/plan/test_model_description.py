# SPDX-License-Identifier: Apache-2.0
"""How a config.json is read, reduced to a language model, or refused."""

import json
from pathlib import Path

import pytest

from testing.shapes import SHAPES
from vllm_hybrid_kv.tools.plan.model_description import DescriptionError, described, read_config

LLAMA = json.loads((SHAPES["llama-3.1-8b"] / "config.json").read_text())
WRAPPER = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"}
QUANTISED = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 4}}
NO_MODEL = "needs 'architectures', a list of class names, and 'model_type'"


def reduced(path):
    """Return a model's description, and the reduced config.json that vLLM reads."""
    with described(path) as model:
        return model, json.loads((Path(model.folder) / "config.json").read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", NO_MODEL),
        ('{"architectures": [], "model_type": "llama"}', NO_MODEL),
        ('{"architectures": ["LlamaForCausalLM"]}', NO_MODEL),
        (b"\xff\xfe", "is not JSON"),
        (json.dumps({**LLAMA, "architectures": ["Larch"]}), "vLLM has no architecture Larch"),
        (json.dumps({**LLAMA, "quantization_config": QUANTISED}), "however received num_bits=4"),
        (json.dumps({**WRAPPER, "text_config": {"model_type": "larch"}}), "'larch'"),
    ],
)
def test_a_file_that_describes_no_model_of_vllm_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DescriptionError, match=message):
        reduced(path)


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(DescriptionError, match=r"No such file .* give a model's folder or its"):
            read_config(path)


def test_a_language_model_is_planned_unchanged_from_a_file_of_any_name(tmp_path):
    file = tmp_path / "described.json"
    file.write_text(json.dumps(LLAMA))
    for path in (file, SHAPES["llama-3.1-8b"]):
        model, config = reduced(path)
        assert (model.architecture, model.notes, config) == ("LlamaForCausalLM", (), LLAMA)
        assert not Path(model.folder).exists()


@pytest.mark.parametrize(
    ("name", "wrapper", "architecture"),
    [
        ("qwen3.6-35b-a3b", "Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
        ("gemma-3-27b", "Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        ("llama-4-scout", "Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
    ],
)
def test_a_multimodal_model_is_planned_as_its_language_model(name, wrapper, architecture):
    model, config = reduced(SHAPES[name])
    assert [model.architecture] == config["architectures"] == [architecture]
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert model.notes == (f"{wrapper} is planned as its language model, {architecture}",)


@pytest.mark.parametrize(
    ("model_type", "wrapper", "architecture"),
    [
        # transformers has no class for the first type, and vLLM has none for the second.
        ("qwen3_vl_text", WRAPPER, "Qwen3ForCausalLM"),
        (
            "cosmos3_edge_text",
            {"architectures": ["Cosmos3EdgeForConditionalGeneration"], "model_type": "cosmos3"},
            "TransformersForCausalLM",
        ),
    ],
)
def test_a_language_model_has_a_class_of_vllm(tmp_path, model_type, wrapper, architecture):
    text = {"model_type": model_type, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps({**wrapper, "text_config": text}))
    model, _ = reduced(tmp_path)
    assert model.architecture == architecture
    assert model.in_words(f"model {model.folder}: no") == f"model {architecture}: no"


def test_the_quantisation_of_weights_is_removed_with_a_note():
    model, config = reduced(SHAPES["gpt-oss-20b"])
    assert "quantization_config" not in config
    assert "(mxfp4) are planned unquantised" in model.notes[0]
    assert model.kv_cache_dtype is None


def test_a_further_file_that_vllm_reads_is_copied(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "added_tokens.json").write_text("{}")
    with described(tmp_path) as model:
        assert (Path(model.folder) / "added_tokens.json").read_text() == "{}"
