# SPDX-License-Identifier: Apache-2.0
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The demo and the benchmarks are run from the repository's root and are not installed.
sys.path.insert(0, str(ROOT))

# Read by vLLM and by huggingface_hub when they are imported: no test asks the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
