# SPDX-License-Identifier: Apache-2.0
"""Shows the counters that other processes left in a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector


class FolderCollector(Collector):
    """The counters in a folder, those of the same labels added up.

    prometheus_client's own collector of such a folder wants it to be there from the beginning.
    """

    def __init__(self, path: Path) -> None:
        """Show what will lie in a folder.

        Args:
            path: The folder. It need not be there yet.
        """
        self._path = path

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of all processes."""
        files = sorted(str(file) for file in self._path.glob("*.db"))
        merged: Iterable[Metric] = MultiProcessCollector.merge(files)
        return merged
