# SPDX-License-Identifier: Apache-2.0
"""Numba's thread pool follows torch's number of threads.

With torch imported first, numba's `omp` layer runs on torch's own OpenMP. A parallel call wakes
as many of the pool's threads as `follow_torch` said last.
"""

from __future__ import annotations

import numba
import torch


def follow_torch() -> int:
    """Let numba's next parallel call use as many threads as torch would, and return how many.

    Fewer where numba was imported before with a smaller pool; never more than torch.
    """
    wanted = torch.get_num_threads()
    count = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
    if numba.get_num_threads() != count:
        numba.set_num_threads(count)
    # The first call starts the pool, and that tells OpenMP, hence torch, to use all of it. vLLM's
    # workers replace `torch.set_num_threads`, once bound to their cores, by one that does nothing.
    if torch.get_num_threads() != wanted:
        torch._C.set_num_threads(wanted)
    return count
