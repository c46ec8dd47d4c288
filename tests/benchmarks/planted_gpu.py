# SPDX-License-Identifier: Apache-2.0
"""The command `python -m benchmarks.gpu` with two faults: a kernel aborts, another raises.

Every child process imports this module again, and with it the faults.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from benchmarks.gpu.__main__ import main


def hang(*arguments: object) -> None:
    time.sleep(3600)


def break_context() -> None:
    """Raise, and let CUDA raise from then on, as after an illegal memory access."""

    def fail() -> None:
        raise RuntimeError("illegal memory access")

    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = fail
    fail()


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

    Ours.attend, UnifiedBf16.attend = fail, abort


if __name__ == "__main__":
    sys.exit(main())
elif __name__ == "__mp_main__":
    _plant()
