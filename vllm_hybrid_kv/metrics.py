# SPDX-License-Identifier: Apache-2.0
"""Prometheus counters of the prefix cache, written by the scheduler and exported on /metrics.

The scheduler of `vllm serve` runs in a child of the process that answers /metrics. So counters pass
through files in prometheus_client's multi-process format. With several API servers, vLLM has a
folder for such files: ours go there, and vLLM exports them. Otherwise the process that the user
started creates a folder, and passes its name to child processes in the environment. It exports the
files together with vLLM's metrics, and removes the folder at exit.

prometheus_client is imported on first use, because most workers do not need it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from vllm_hybrid_kv.hooks import STOCK
from vllm_hybrid_kv.settings import Settings
from vllm_hybrid_kv.state import STATE

PREFIX = "vllm_hybrid_kv:"

FILE_BYTES = 1 << 16
"""prometheus_client creates files of this size, and all counters here fit into one file."""

HELP = {
    "prefix_cache_requests": "Requests that read the prefix cache, each counted once, when first "
    "scheduled.",
    "prefix_cache_short_requests": "Requests shorter than the match unit, which can never hit.",
    "prefix_cache_hit_tokens": "Prompt tokens read from the prefix cache. All kinds of KV groups "
    "hit the same tokens.",
    "prefix_cache_alone_tokens": "Prompt tokens that the KV groups of this kind could have served "
    "without the other groups.",
    "prefix_cache_limited_requests": "Requests that hit less than was cached, by the kind of KV "
    "group that lost most tokens.",
    "prefix_cache_lost_tokens": "Prompt tokens that full attention could serve and that were "
    "recomputed because the KV groups of this kind could not.",
    "prefix_cache_preempted_requests": "Requests that read the prefix cache again after a "
    "preemption. The other counters exclude them.",
    "prefix_cache_preempted_query_tokens": "Tokens of requests that resumed after a preemption: "
    "the prompt and the output up to then.",
    "prefix_cache_preempted_hit_tokens": "Tokens of requests that resumed after a preemption that "
    "were read from the prefix cache.",
    "checkpoints_kept": "States that were kept for later requests.",
    "checkpoints_used": "Requests that resumed at a kept state.",
    "checkpoints_evicted": "Kept states that were evicted to make room.",
    "checkpoints_evicted_unused": "Kept states that were evicted before any request used them.",
}
"""The help text of each counter, by its name without the prefix and without `_total`."""


class Counters:
    """Writes the counters of one engine."""

    def __init__(self, folder: Path, labels: dict[str, str]) -> None:
        """Open this process's file in a folder, and create the folder if needed.

        Raises:
            OSError: The file cannot be written, or the disk is full.
        """
        self._file = _open(folder)
        self._labels = labels
        self._keys: dict[tuple[str, str | None], str] = {}

    def add(self, name: str, amount: int, kind: str | None = None) -> None:
        """Add to a counter of `HELP`. Adding 0 creates it. `kind` becomes a label if given."""
        key = self._keys.get((name, kind)) or self._new_key(name, kind)
        self._file.write_value(key, self._file.read_value(key)[0] + amount, 0.0)

    def _new_key(self, name: str, kind: str | None) -> str:
        from prometheus_client.mmap_dict import mmap_key

        labels = self._labels if kind is None else {**self._labels, "kind": kind}
        metric = PREFIX + name
        key = mmap_key(metric, f"{metric}_total", list(labels), labels.values(), HELP[name])
        return self._keys.setdefault((name, kind), key)


def _open(folder: Path) -> Any:
    """Return this process's file, opened on first use. All engines of the process share it."""
    process = (os.getpid(), folder)
    if process in STATE.metrics_files:
        return STATE.metrics_files[process]
    from prometheus_client.mmap_dict import MmapedDict

    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # prometheus_client takes a metric's type from its file's name, up to the first underscore.
    # "hybrid-kv-" keeps our file apart from the file of vLLM's own counters in this process.
    path = folder / f"counter_hybrid-kv-{os.getpid()}.db"
    # The file is memory-mapped: on a full disk, a write would kill the process with SIGBUS.
    with path.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, FILE_BYTES)
    STATE.metrics_files[process] = MmapedDict(str(path))
    return STATE.metrics_files[process]


MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"
"""The variable that names the folder of prometheus_client's multi-process mode. vLLM sets it."""

VARIABLE = "HYBRID_KV_METRICS_DIR"
"""The variable that tells child processes which folder is ours. It is not a setting."""


def publish(_: object, settings: Settings) -> None:
    """Create a folder for counters and export its files on /metrics, unless a parent exports them.

    With vLLM's own coordinator there are no counters, so this does nothing.
    """
    if settings.coordinator == STOCK or MULTIPROC in os.environ:
        return
    # Without a multiprocessing parent, a process that inherited the variable is a new server.
    exported_by_parent = VARIABLE in os.environ and multiprocessing.parent_process() is not None
    if exported_by_parent or STATE.metrics_owner == os.getpid():
        return
    from prometheus_client import REGISTRY
    from prometheus_client.multiprocess import MultiProcessCollector

    STATE.metrics_owner = os.getpid()
    os.environ[VARIABLE] = tempfile.mkdtemp(prefix=f"vllm-hybrid-kv-{os.getpid()}-")
    MultiProcessCollector(REGISTRY, os.environ[VARIABLE])
    atexit.register(_remove, os.environ[VARIABLE], os.getpid())


def _remove(folder: str, owner: int) -> None:
    # A process that was forked from the owner runs this handler too.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def engine_labels() -> dict[str, str]:
    """Return the labels with which vLLM's own metrics mark the engine of this process."""
    config = STATE.engine_config
    if config is None:
        return {"model_name": "", "engine": "0"}
    model = config.model_config
    return {
        "model_name": "" if model is None else str(model.served_model_name),
        "engine": str(config.parallel_config.data_parallel_index),
    }


def folder() -> Path | None:
    """Return the folder for counters, or None if no process exports them."""
    name = os.environ.get(MULTIPROC) or os.environ.get(VARIABLE)
    return Path(name) if name else None
