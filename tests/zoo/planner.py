# SPDX-License-Identifier: Apache-2.0
"""Run as a process that gets names of architectures and returns their plans."""

from __future__ import annotations

import json
import os
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from testing.engine_host import execute_commands

DTYPES = ("auto", "fp8", "turboquant_k8v4")
MEMORY = 128 << 30
LONGEST = 32768


def plan(architecture: str) -> dict[str, Any]:
    """Plan an architecture; return a row with the config's source, the pattern and the plans."""
    from tests.zoo.configurations import configuration_of
    from tests.zoo.models import ARGUMENTS, FILES
    from vllm_hybrid_kv.tools.plan.model_description import DescriptionError, described

    row: dict[str, Any] = {"plans": {}, "pattern": None}
    try:
        fields, source = configuration_of(architecture)
    except Exception as error:
        return {**row, "planned_as": architecture, "plans": refused(f"no configuration: {error}")}
    options = ARGUMENTS.get(architecture, {})
    row["source"] = source + "".join(
        f", --{name.replace('_', '-')} {value}" for name, value in options.items()
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields, default=str))
        for name, text in FILES.get(architecture, {}).items():
            (Path(folder) / name).write_text(text)
        try:
            with described(Path(folder)) as description:
                row["planned_as"] = description.architecture
                for dtype in DTYPES:
                    arguments = {"kv_cache_dtype": dtype, **options}
                    row["plans"][dtype] = _plan_with(description, arguments, row)
        except DescriptionError as error:
            row["plans"] = refused(str(error))
    return row


def refused(reason: str) -> dict[str, Any]:
    """Return the `plans` of a row if every cache dtype is refused for the same reason."""
    return {dtype: {"refused": reason} for dtype in DTYPES}


def _plan_with(description: Any, options: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from tests.zoo.patterns import pattern_of
    from vllm_hybrid_kv.tools.options import one_line
    from vllm_hybrid_kv.tools.plan.engine import Model
    from vllm_hybrid_kv.tools.plan.kv_cache_plan import plan_of

    built: list[Any] = []

    class RecordingModel(Model):
        """Records the built model and its layers with a KV cache."""

        def build(self, config: Any) -> Any:
            model = super().build(config)
            built.append((model, get_layers_from_vllm_config(config, AttentionLayerBase)))
            return model

    fields = json.loads((Path(description.folder) / "config.json").read_text())
    positions = fields.get("max_position_embeddings") or LONGEST
    arguments = {"model": description.folder, "max_num_seqs": 256, **options}
    if isinstance(positions, int) and positions > LONGEST:
        arguments["max_model_len"] = LONGEST
    try:
        planned = plan_of(RecordingModel(arguments), MEMORY, {})
    except Exception as error:
        traceback.print_exc()
        return {"refused": description.in_words(one_line(error))}
    if options["kv_cache_dtype"] == "auto":
        row["pattern"] = pattern_of(*built[0])
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


def start() -> None:
    from vllm_hybrid_kv.tools.plan.vllm_import import ENVIRONMENT, import_vllm, prepare

    os.environ.update({**ENVIRONMENT, **os.environ})
    import_vllm()
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    if vllm.platforms.current_platform.is_unspecified():
        # The wheel of a release without a CPU build detects no device.
        vllm.platforms.current_platform = CpuPlatform()
    prepare()


if __name__ == "__main__":
    start()
    execute_commands({"answer": plan}.__getitem__)
