# SPDX-License-Identifier: Apache-2.0
"""The k8v4 page format and the kernels that read and write it. Knows nothing of vLLM.

k8v4.py          sizes and offsets of the page format
reference.py     the float32 definition of the arithmetic, which every kernel is compared with
inputs.py        checks of the kernels' arguments
known_answer.py  a quick test of a store and an attention kernel, run at every start
cpu/, triton/    the kernels of CPUs and GPUs
"""
