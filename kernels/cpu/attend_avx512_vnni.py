# SPDX-License-Identifier: Apache-2.0
"""Paged attention with the byte dot product of AVX-512 VNNI."""

from __future__ import annotations

from vllm_hybrid_kv.kernels.cpu import products, records

_attend = products.attend(products.Products(vnni=True, rows=8))


def work(call_address, scratch):  # type: ignore[no-untyped-def]
    """Process work items until none is left. Both arguments are addresses."""
    _attend(records.attention_call_at(call_address), scratch)
