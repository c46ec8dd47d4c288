# SPDX-License-Identifier: Apache-2.0
"""Run compiled code on numba's thread pool, which follows torch's number of threads.

If torch is imported first, numba's `omp` layer runs on torch's own OpenMP. A parallel call wakes
as many threads of the pool as the last call of `follow_torch` set.
"""

from __future__ import annotations

import numba
import torch
from llvmlite import ir

from vllm_hybrid_kv.kernels.cpu.compile_cache import cached
from vllm_hybrid_kv.kernels.cpu.inline import Int64, inline_llvm
from vllm_hybrid_kv.kernels.cpu.llvm import I64, Emitter


def follow_torch() -> int:
    """Set numba's next parallel call to torch's number of threads, and return the number.

    Fewer if numba was imported before with a smaller pool; never more than torch's.
    """
    wanted = torch.get_num_threads()
    count = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
    if numba.get_num_threads() != count:
        numba.set_num_threads(count)
    # The first call starts the pool, which tells OpenMP, hence torch, to use all of it. vLLM's
    # workers replace `torch.set_num_threads` with a no-op after they pin their cores.
    if torch.get_num_threads() != wanted:
        torch._C.set_num_threads(wanted)
    return count


@inline_llvm
def _call(e: Emitter, code: Int64, first: Int64, second: Int64) -> None:
    """Call a C function of two int64 by its address."""
    function = ir.FunctionType(ir.VoidType(), [I64, I64])
    e.b.call(e.b.inttoptr(code, function.as_pointer()), [first, second])


@cached(parallel=True)
def run_on_threads(code, call, scratch):  # type: ignore[no-untyped-def]
    """Call `code(call, own scratch)` once for each row of uint8 [threads, bytes] scratch."""
    for thread in numba.prange(scratch.shape[0]):
        own = (scratch[thread].ctypes.data + 63) // 64 * 64
        _call(code, call, own)
