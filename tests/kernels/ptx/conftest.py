# SPDX-License-Identifier: Apache-2.0
import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process", allow_module_level=True)
