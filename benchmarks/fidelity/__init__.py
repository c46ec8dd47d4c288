# SPDX-License-Identifier: Apache-2.0
"""Measure the error of attention when keys and values are stored as k8v4, or by other rules.

    python -m benchmarks.fidelity [--out DIR] [--model FOLDER ...]

The last 64 tokens attend to all tokens before them, in float32, with keys and values that a rule
has rounded. The error of an output is its distance from the exact output, relative to the exact
output's norm. Tables have means over queries, heads and seeds. `rules` defines the rules. `sources`
makes keys and values from several random distributions, or records them from a model's layers. Only
one thread runs, because the order of sums changes the last bits.
"""
