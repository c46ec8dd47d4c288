# SPDX-License-Identifier: Apache-2.0
"""How far is attention off with keys and values stored as k8v4, and would another rule do better?

    python -m benchmarks.fidelity [--out DIR] [--model FOLDER ...] [--quick]

The attention of the last 64 tokens to all before them, in float32, with keys and values as a rule
gives them back, against the same with nothing rounded: the norm of the difference relative to the
exact output's, mean over queries, heads and seeds. `rules.py` has the rules, `sources.py` what is
stored: numbers drawn from distributions, and what the attention layers of a model really store.
All are seeded. One thread, so that the numbers do not hang on how sums are divided.
"""
