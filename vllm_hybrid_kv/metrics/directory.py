# SPDX-License-Identifier: Apache-2.0
"""Where the scheduler's process leaves its counters for the process that answers /metrics.

`vllm serve` schedules in a child of the process that answers /metrics. Counters go from one to the
other in files of prometheus_client's multi-process format. With several API servers vLLM has a
folder for such files and shows what is in it: ours lie there, too. Else the process that the user
started chooses a folder, hands its name to its children in the environment, shows what lies in it
beside vLLM's metrics, and removes it at its end. Whoever counts makes the folder: where nobody
does there is none.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_hybrid_kv.state import STATE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_hybrid_kv.settings import Settings

MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder of vLLM's and prometheus_client's multi-process mode."""

VARIABLE = "HYBRID_KV_METRICS_DIR"
"""Names ours, for children. It does not begin like a setting, for it is none."""


def publish(vllm_config: VllmConfig, settings: Settings) -> None:
    """Publish the counters of an engine's coordinator, unless it is vLLM's own, which has none."""
    if settings.coordinator != "stock":
        _share()


def engine_labels() -> dict[str, str]:
    """Return the labels that vLLM gives the metrics of the engine that this process runs."""
    config = STATE.engine_config
    if config is None:
        return {"model_name": "", "engine": "0"}
    model = config.model_config
    return {
        "model_name": "" if model is None else str(model.served_model_name),
        "engine": str(config.parallel_config.data_parallel_index),
    }


def folder() -> Path | None:
    """Return where to leave counters; None where nobody would show them."""
    name = os.environ.get(MULTIPROC) or os.environ.get(VARIABLE)
    return Path(name) if name else None


def _share() -> None:
    """Choose a folder and show what will lie in it, unless another process does."""
    if MULTIPROC in os.environ or STATE.metrics_owner == os.getpid():
        return
    if VARIABLE in os.environ and multiprocessing.parent_process() is not None:
        # One that is no such child, but inherited the variable, is a server of its own.
        return
    # In the one process that shows them, and not in every worker.
    from prometheus_client import REGISTRY

    from vllm_hybrid_kv.metrics.collector import FolderCollector

    STATE.metrics_owner = os.getpid()
    path = Path(tempfile.gettempdir()) / f"vllm-hybrid-kv-{os.getpid()}-{secrets.token_hex(8)}"
    os.environ[VARIABLE] = str(path)
    REGISTRY.register(FolderCollector(path))
    atexit.register(_remove, path, os.getpid())


def _remove(path: Path, owner: int) -> None:
    # Not at the end of a process that was forked from the owner.
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
