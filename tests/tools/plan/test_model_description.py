# SPDX-License-Identifier: Apache-2.0
"""How a config.json is read, reduced to a language model, or refused."""

import json
from pathlib import Path

import pytest

from testing.shapes import SHAPES
from vllm_hybrid_kv.tools.plan.model_description import DescriptionError, described, read_config

LLAMA = json.loads((SHAPES["llama-3.1-8b"] / "config.json").read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "not an object"),
        ("{}", "names no architecture"),
        ('{"architectures": []}', "names no architecture"),
        ('{"architectures": ["LlamaForCausalLM"]}', "'model_type' is missing"),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_a_file_that_describes_no_model_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DescriptionError, match=message):
        read_config(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DescriptionError, match=r"no such file: .*missing"):
        read_config(tmp_path / "missing")
    with pytest.raises(DescriptionError, match=r"has no config\.json"):
        read_config(tmp_path)


def test_a_file_of_any_name_and_its_folder_give_the_same(tmp_path):
    file = tmp_path / "described.json"
    file.write_text(json.dumps(LLAMA))
    assert read_config(file) == read_config(SHAPES["llama-3.1-8b"]) == LLAMA


def test_a_language_model_is_planned_unchanged():
    with described(SHAPES["llama-3.1-8b"]) as model:
        assert (model.architecture, model.notes) == ("LlamaForCausalLM", ())
        assert json.loads((Path(model.folder) / "config.json").read_text()) == LLAMA
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
    with described(SHAPES[name]) as model:
        config = json.loads((Path(model.folder) / "config.json").read_text())
    assert model.architecture == architecture
    assert config["architectures"] == [architecture]
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert model.notes == (f"{wrapper} is planned as its language model, {architecture}",)


def test_the_quantisation_of_weights_is_removed_with_a_note():
    with described(SHAPES["gpt-oss-20b"]) as model:
        config = json.loads((Path(model.folder) / "config.json").read_text())
    assert "quantization_config" not in config
    assert "(mxfp4) are planned unquantised" in model.notes[0]
    assert model.kv_cache_dtype is None


def test_the_cache_dtype_of_a_quantised_checkpoint_is_kept(tmp_path):
    quantised = {
        **LLAMA,
        "quantization_config": {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8"},
    }
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with described(tmp_path) as model:
        assert model.kv_cache_dtype in ("fp8", "fp8_e4m3")


def test_an_architecture_that_vllm_lacks_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({**LLAMA, "architectures": ["LarchForCausalLM"]})
    )
    with (
        pytest.raises(DescriptionError, match="vLLM has no architecture LarchForCausalLM"),
        described(tmp_path),
    ):
        pass


def test_a_multimodal_model_with_an_unknown_language_model_is_refused(tmp_path):
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {"model_type": "larch"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DescriptionError, match="'larch'"), described(tmp_path):
        pass


def test_a_language_model_without_a_class_in_transformers_has_one_of_vllm(tmp_path):
    text = {"model_type": "qwen3_vl_text", "hidden_size": 64}
    wrapped = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl"}
    (tmp_path / "config.json").write_text(json.dumps({**wrapped, "text_config": text}))
    with described(tmp_path) as model:
        assert model.architecture == "Qwen3ForCausalLM"
        assert model.in_words(f"model {model.folder}: no") == "model Qwen3ForCausalLM: no"


def test_a_language_model_that_only_transformers_has_uses_vllms_transformers_class(tmp_path):
    text = {"model_type": "cosmos3_edge_text", "hidden_size": 64}
    wrapped = {"architectures": ["Cosmos3EdgeForConditionalGeneration"], "model_type": "cosmos3"}
    (tmp_path / "config.json").write_text(json.dumps({**wrapped, "text_config": text}))
    with described(tmp_path) as model:
        assert model.architecture == "TransformersForCausalLM"


def test_a_further_file_that_vllm_reads_is_required_and_copied(tmp_path):
    config = {"architectures": ["Dots3NoteForCausalLM"], "model_type": "dots3_note"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DescriptionError, match="also reads added_tokens"), described(tmp_path):
        pass
    (tmp_path / "added_tokens.json").write_text("{}")
    with described(tmp_path) as model:
        assert (Path(model.folder) / "added_tokens.json").read_text() == "{}"
