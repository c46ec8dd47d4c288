# SPDX-License-Identifier: Apache-2.0
"""Are the GPU kernels right on this GPU, and how fast are they beside what else there is?

    python -m benchmarks.gpu --out DIR

Read from the top down:

* `__main__`     the command: correctness, then measurements in order of importance, then files
* `shapes`       what is measured, in which order, and how many bytes it takes
* `sections`     each kind of measurement: who competes in it, and what is noted
* `contenders/`  the kernels: ours, stock k8v4, vLLM's unified attention, FlashAttention, FlashInfer
* `measure`      CUDA graphs, alternating rounds, medians of times and of ratios
* `correctness`  our kernels against the float32 reference, on the device
* `goals`        the goals beside what was measured
* `report`       JSON, Markdown and the roofline picture
* `environment`  which GPU, driver and versions; the clock; vLLM's files
* `tune`         `--tune`: which size of program is fastest on this GPU

It needs torch, Triton and vLLM's Python files; what is missing is left out, with the reason told.
Where there is no GPU, Triton's interpreter (TRITON_INTERPRET=1) runs all of it at tiny sizes
(`--smallest`), which shows that the command works and says nothing about speed.
"""
