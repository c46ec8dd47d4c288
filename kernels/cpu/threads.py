# SPDX-License-Identifier: Apache-2.0
"""Run compiled code on numba's thread pool, which follows torch's number of threads.

If torch is imported first, numba's `omp` layer runs on torch's own OpenMP. `follow_torch` sets how
many threads of the pool the next parallel calls wake.
"""

from __future__ import annotations

import numba
import torch
from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu.compile_cache import cached
from vllm_hybrid_kv.kernels.cpu.inline import Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import I64, Emitter


def follow_torch() -> int:
    """Let numba's next parallel call use as many threads as torch, and return their number.

    The number is smaller than torch's if numba was imported earlier with a smaller pool.
    """
    wanted = torch.get_num_threads()
    count = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
    if numba.get_num_threads() != count:
        numba.set_num_threads(count)
    # The first call starts the pool, which changes OpenMP's number of threads, and thus torch's, to
    # the pool's size. Restore torch's with `torch._C`, because vLLM's workers replace
    # `torch.set_num_threads` with a no-op after they pin their cores.
    if torch.get_num_threads() != wanted:
        torch._C.set_num_threads(wanted)
    return count


@inline_llvm
def _call(e: Emitter, code: Int64, first: Int64, second: Int64) -> None:
    """Call the C function at an address with two int64 arguments."""
    function = ir.FunctionType(ir.VoidType(), [I64, I64])
    e.b.call(e.b.inttoptr(code, function.as_pointer()), [first, second])


def _run_on_threads(code, call, scratch):  # type: ignore[no-untyped-def]
    """Call the function at `code` in parallel, as `code(call, address of the thread's scratch)`.

    `scratch` is uint8 [threads, bytes]. Each call uses one row, from its first 64-byte boundary on.
    """
    for thread in numba.prange(scratch.shape[0]):
        own = (scratch[thread].ctypes.data + 63) // 64 * 64
        _call(code, call, own)


run_on_threads = cached(_run_on_threads, parallel=True)
