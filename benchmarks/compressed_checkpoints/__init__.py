# SPDX-License-Identifier: Apache-2.0
"""Measure what recall loses if checkpoints of Gated DeltaNet's states are stored in 8 bits.

`python -m benchmarks.compressed_checkpoints [--output FILE]`. Two trained models answer questions
in conversations of 16 turns (float32, transformers). Each turn resumes from the stored states of
the turn before. All storage rules answer the same questions.
"""
