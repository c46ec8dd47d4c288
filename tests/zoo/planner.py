# SPDX-License-Identifier: Apache-2.0
"""A process that plans one architecture after another: names in, JSON out, a line each.

    python -m tests.zoo.planner [--as-cpu]

`--as-cpu` serves the unpacked wheel of a release without a build for CPUs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

DTYPES = ("auto", "fp8", "turboquant_k8v4")
MEMORY = 128 << 30
LONGEST = 32768


def plan(architecture: str) -> dict[str, Any]:
    """Return an architecture's row: its configuration's source, pattern and plans."""
    from tests.zoo.configurations import configuration_of
    from tests.zoo.models import ARGUMENTS, FILES
    from vllm_hybrid_kv.tools.plan.model_description import DescriptionError, described
    from vllm_hybrid_kv.tools.serve_options import one_line

    began = time.monotonic()
    row: dict[str, Any] = {"plans": {}, "pattern": None}
    try:
        configuration = configuration_of(architecture)
    except Exception as error:
        return {**row, "no_configuration": f"{type(error).__name__}: {error}"}
    row["source"] = configuration.source
    asked = ARGUMENTS.get(architecture, {})
    for name, value in asked.items():
        row["source"] += f", --{name.replace('_', '-')} {value}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(configuration.fields, default=str))
        for name, text in FILES.get(architecture, {}).items():
            (Path(folder) / name).write_text(text)
        try:
            with described(Path(folder)) as description:
                row["planned_as"] = description.architecture
                for dtype in DTYPES:
                    arguments = {"kv_cache_dtype": dtype, **asked}
                    row["plans"][dtype] = _plan_with(description, arguments, row)
        except DescriptionError as error:
            row["plans"] = {dtype: {"refused": one_line(error)} for dtype in DTYPES}
    row["seconds"] = round(time.monotonic() - began, 1)
    return row


def _plan_with(description: Any, asked: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    from vllm_hybrid_kv.tools.plan.kv_cache_plan import plan_of
    from vllm_hybrid_kv.tools.plan.model_description import GPU
    from vllm_hybrid_kv.tools.serve_options import one_line

    fields = json.loads((Path(description.folder) / "config.json").read_text())
    positions = fields.get("max_position_embeddings") or LONGEST
    arguments = {
        "model": description.folder,
        "gpu_memory_utilization": 0.1,
        "max_num_seqs": 256,
        **asked,
    }
    if isinstance(positions, int) and positions > LONGEST:
        arguments["max_model_len"] = LONGEST
    built: list[Any] = []
    try:
        model = _recording(built)(arguments, GPU)
        planned = plan_of(model, MEMORY, {}).plan
    except Exception as error:
        if os.environ.get("ZOO_TRACEBACKS"):
            import traceback

            traceback.print_exc()
        return {"refused": description.in_words(one_line(error))}
    if asked["kv_cache_dtype"] == "auto":
        from tests.zoo.patterns import pattern_of

        row["pattern"] = pattern_of(*built[0]).to_json()
    kinds: Counter[str] = Counter()
    for pages in planned.pages:
        kinds[f"{pages.kind}: {pages.stores}" if pages.stores else pages.kind] += len(pages.layers)
    return {
        "layers": dict(kinds),
        "blocks": planned.blocks,
        "block_tokens": sorted({pages.block_tokens for pages in planned.pages}),
        "tokens": planned.reported_tokens,
        "smallest_hit": planned.smallest_hit if planned.can_hit else None,
        "warnings": list(planned.warnings),
    }


def _recording(built: list[Any]) -> Any:
    """Return `Model` that records what it builds, with the layers that have a KV cache."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from vllm_hybrid_kv.tools.plan.engine import Model

    class RecordingModel(Model):
        def build(self, config: Any) -> Any:
            model = super().build(config)
            built.append((model, get_layers_from_vllm_config(config, AttentionLayerBase)))
            return model

    return RecordingModel


def main() -> None:
    """Answer the names on standard input."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # What vLLM and its libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm_hybrid_kv.tools.plan.vllm_import import import_vllm

    import_vllm()
    if "--as-cpu" in sys.argv:
        import vllm.platforms
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms.current_platform = CpuPlatform()
    from vllm_hybrid_kv import plugin

    plugin.register()
    logging.getLogger("vllm").setLevel("CRITICAL")
    for line in sys.stdin:
        print(json.dumps(plan(line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
