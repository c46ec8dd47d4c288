# SPDX-License-Identifier: Apache-2.0
"""The error of attention with keys and values stored as k8v4, and with other rules.

    python -m benchmarks.fidelity [--out DIR] [--model FOLDER ...] [--quick]

The last 64 tokens attend to all tokens before them, in float32, with keys and values after storing
by a rule. The error is the norm of the difference to attention without rounding, relative to its
norm, the mean over queries, heads and seeds. `rules` has the rules. `sources` has the keys and
values: random numbers of several distributions, and recorded attention layers of models. All are
seeded. One thread, because the order of sums changes the last bits.
"""
