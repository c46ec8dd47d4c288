# SPDX-License-Identifier: Apache-2.0
"""Check the GPU kernels on this GPU, and compare their speed with that of other kernels.

    python -m benchmarks.gpu --out DIR

* `__main__`     the command
* `run`          the parts of a run: checks, then measurements in order of importance
* `children`     calls in processes that may crash, hang or break the CUDA context
* `checks`       our kernels against the float32 reference, on the device
* `shapes`       the parts, what each measures in which order, and how many bytes it reads
* `sections`     each kind of measurement, with its contenders and results
* `contenders/`  the kernels: ours, vLLM's (stock k8v4, unified, FlashAttention), torch's
* `measure`      times and ratios, with `triton.testing`
* `predictions`  what `testing.triton.performance_model` predicts from the machine code
* `goals`        the goals and how the measurements meet them
* `report`       JSON for each part, and Markdown for all parts
* `environment`  the GPU, versions and time budget; vLLM's modules
* `tune`         `--tune`: the fastest tile sizes on this GPU

It needs torch and Triton. Contenders that are not installed are left out, with the reason.
Without a GPU, Triton's interpreter runs all of it at tiny sizes (`--rehearse`): this tests the
command and measures nothing.
"""
