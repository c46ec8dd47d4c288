# SPDX-License-Identifier: Apache-2.0
"""Models as their public configurations describe them, as far as that decides about sizes."""

from pathlib import Path

SHAPES = {path.parent.name: path.parent for path in Path(__file__).parent.glob("*/config.json")}
