# SPDX-License-Identifier: Apache-2.0
"""Public configurations of models, reduced to the fields that decide about sizes."""

from pathlib import Path

SHAPES = {path.parent.name: path.parent for path in Path(__file__).parent.glob("*/config.json")}
