# SPDX-License-Identifier: Apache-2.0
"""Public model configurations, reduced to the fields that determine sizes."""

from pathlib import Path

SHAPES = {path.parent.name: path.parent for path in Path(__file__).parent.glob("*/config.json")}
