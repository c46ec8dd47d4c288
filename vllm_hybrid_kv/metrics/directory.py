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

from vllm_hybrid_kv.settings import current_settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder of vLLM's and prometheus_client's multi-process mode."""

VARIABLE = "HYBRID_KV_METRICS_DIR"
"""Names ours, for children. It does not begin like a setting, for it is none."""

_owner: int | None = None
_engine_labels = {"model_name": "", "engine": "0"}


def follow(vllm_config: VllmConfig) -> None:
    """Be told the configuration of an engine whose settings are in force in this process.

    Args:
        vllm_config: The engine's.
    """
    model = vllm_config.model_config
    _engine_labels["model_name"] = "" if model is None else str(model.served_model_name)
    _engine_labels["engine"] = str(vllm_config.parallel_config.data_parallel_index)
    if current_settings().coordinator != "stock":
        _share()


def engine_labels() -> dict[str, str]:
    """Return the labels that vLLM gives the metrics of the engine that this process runs."""
    return dict(_engine_labels)


def folder() -> Path | None:
    """Return where to leave counters; None where nobody would show them."""
    name = os.environ.get(MULTIPROC) or os.environ.get(VARIABLE)
    return Path(name) if name else None


def _share() -> None:
    """Choose a folder and show what will lie in it, unless another process does."""
    global _owner
    if MULTIPROC in os.environ or _owner == os.getpid():
        return
    if VARIABLE in os.environ and multiprocessing.parent_process() is not None:
        # One that is no such child, but inherited the variable, is a server of its own.
        return
    # In the one process that shows them, and not in every worker.
    from prometheus_client import REGISTRY

    from vllm_hybrid_kv.metrics.collector import FolderCollector

    _owner = os.getpid()
    path = Path(tempfile.gettempdir()) / f"vllm-hybrid-kv-{_owner}-{secrets.token_hex(8)}"
    os.environ[VARIABLE] = str(path)
    REGISTRY.register(FolderCollector(path))
    atexit.register(_remove, path, _owner)


def _remove(path: Path, owner: int) -> None:
    # Not at the end of a process that was forked from the owner.
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
