# SPDX-License-Identifier: Apache-2.0
"""Convert a GGUF file to a Hugging Face folder with bfloat16 weights.

python -m benchmarks.accuracy.convert FILE.gguf FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(source: Path, out: Path) -> None:
    """Dequantise the file `source`, and write a model and its tokenizer to `out`."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # transformers still marks the model as quantised, and would refuse to save it.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if "gemma" in source.name:
        # Gemma predicts badly without <bos>, which the tokenizer of the file does not add.
        begin = (tokenizer.bos_token, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{begin[0]} $A", pair=f"{begin[0]} $A {begin[0]} $B", special_tokens=[begin]
        )
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
