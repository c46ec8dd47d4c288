# SPDX-License-Identifier: Apache-2.0
"""A machine that executes the PTX of kernels, with shadows that detect what a GPU does not define.

    parser         PTX text to instructions
    arithmetic     the arithmetic of PTX where numpy's own differs
    operations     the instructions that each lane executes for itself
    warp           the instructions that a warp executes together
    tensor_memory  the instructions of tensor memory, and barriers in shared memory
    memory         global and shared memory, their bounds and shadows
    machine        registers, masks, scheduling and barriers
    decode         instructions to functions that change a machine
    program        a kernel that is ready to run
    launch         a driver for Triton: launches run here

Not modelled: payloads of NaNs, the errors of approximate instructions, and the order of lanes
within a warp, which run in lockstep.
"""
