# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.gpu` with a fault, named by an environment variable.

Every child process imports this module again, and with it the fault.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from benchmarks.gpu.__main__ import main

FAULT = os.environ["PLANTED_FAULT"]


def _plant() -> None:
    from benchmarks.gpu.contenders import Ours
    from benchmarks.gpu.contenders.vllm_kernels import UnifiedBf16

    ours, unified = Ours.attend, UnifiedBf16.attend

    def abort(self: Any, layer: int) -> Any:
        shape = self.batch.shape
        if self.name == "unified bf16" and shape.ragged and shape.most_new == 1:
            os.abort()
        return unified(self, layer)

    def fail(self: Any, layer: int, plan: Any = None) -> Any:
        if self.name == "ours" and self.batch.shape.most_new == 2:
            raise RuntimeError("a planted fault")
        return ours(self, layer, plan)

    def hang(self: Any, layer: int, plan: Any = None) -> Any:
        time.sleep(3600)

    if FAULT == "hang":
        Ours.attend = hang
    else:
        Ours.attend, UnifiedBf16.attend = fail, abort


if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__":
    _plant()
