# SPDX-License-Identifier: Apache-2.0
"""The k8v4 page format and the kernels that read and write it. Knows nothing of vLLM.

`k8v4` owns sizes and offsets, `reference` is the float32 definition of the arithmetic that
every kernel is held to, `cpu` holds the CPU kernels, `triton` those of GPUs.
"""
