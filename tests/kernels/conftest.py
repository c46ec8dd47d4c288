# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path

# `batches` is a module of these tests alone.
sys.path.insert(0, str(Path(__file__).parent))
