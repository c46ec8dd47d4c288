# SPDX-License-Identifier: Apache-2.0
"""Check the GPU kernels on this GPU, and compare their speed with that of other kernels.

    python -m benchmarks.gpu --out DIR

* `__main__`     the command: checks, then measurements in order of importance, then files
* `checks`       our kernels against the float32 reference, on the device
* `shapes`       what is measured, in which order, and how many bytes it reads
* `sections`     each kind of measurement, with its contenders and results
* `contenders/`  the kernels: ours, vLLM's (stock k8v4, unified, FlashAttention), torch's
* `measure`      times and ratios, with `triton.testing`
* `goals`        the goals and how the measurements meet them
* `report`       JSON and Markdown
* `environment`  the GPU, versions and time budget; vLLM's modules
* `processes`    checks and compiling in several processes
* `tune`         `--tune`: the fastest tile sizes on this GPU

It needs torch and Triton. Contenders that are not installed are left out, with the reason.
Without a GPU, Triton's interpreter (TRITON_INTERPRET=1) runs all of it at tiny sizes
(`--smallest`): this tests the command and measures nothing.
"""
