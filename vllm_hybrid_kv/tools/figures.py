# SPDX-License-Identifier: Apache-2.0
"""How commands draw: matplotlib without a screen, one figure, one file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def figure(path: Path, *shape: int, **how: Any) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its axes to draw on, and write it when that is done.

    Args:
        path: The file; its ending is the format.
        shape: Rows and columns of axes.
        how: As matplotlib's `subplots`.

    Raises:
        OSError: It cannot be written.
        ValueError: matplotlib does not know the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(*shape, layout="constrained", **how)
    try:
        yield drawn, axes
        drawn.savefig(path, dpi=150)
    finally:
        pyplot.close(drawn)
