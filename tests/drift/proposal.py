# SPDX-License-Identifier: Apache-2.0
"""The adapter that a release asks for, as Python, as far as it follows from the comparison."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tests.drift.adapters import Adapter
from tests.drift.targets import Finding
from vllm_hybrid_kv.patches.base import Target

WIDTH = 100

DECIDES = {"get_attn_backend_cls": "cpu_refuses_dtypes"}
"""Fields of `Targets` that are decided by reading the source of a target."""


def adapter_module(adapter: Adapter, findings: Sequence[Finding], version: str) -> str:
    """Return the source of an adapter for a release.

    What is gone or unreadable stays as it was, so that the plugin stays inactive with it.

    Args:
        adapter: The one that it starts from.
        findings: For each of its targets.
        version: The release's.
    """
    fields = "".join(field_source(finding) for finding in findings)
    facts = "".join(f"    {name}={value!r},\n" for name, value in adapter.facts.items())
    return f'''# SPDX-License-Identifier: Apache-2.0
"""vLLM {version}, after {adapter.name}."""

from __future__ import annotations

from vllm_hybrid_kv.patches.adapter import Targets, build
from vllm_hybrid_kv.patches.base import Fingerprint, Patch, Target
from vllm_hybrid_kv.patches.context import Context

TARGETS = Targets(
{fields}{facts})


def patches(context: Context) -> list[Patch]:
    """Return this minor's patches, not applied."""
    return build(context, TARGETS)
'''


def field_source(finding: Finding) -> str:
    """Return the lines of one field of `Targets`, formatted as ruff does."""
    target: Target = finding.now or finding.target
    signature, source = target.fingerprint.signature, target.fingerprint.source
    short = f'        Fingerprint("{signature}", "{source}"),\n'
    if not set('"\\') & set(signature) and len(short) - 1 <= WIDTH:
        fingerprint = short
    else:
        # Wrapped between words alone, and every piece keeps the blank that follows it.
        pieces = textwrap.wrap(
            signature, 76, drop_whitespace=False, break_long_words=False, break_on_hyphens=False
        )
        lines = [f"            {_quoted(piece)}\n" for piece in _trailing_blanks(pieces)]
        short = f'            {_quoted(signature)}, "{source}"\n'
        if len(short) - 1 <= WIDTH:
            lines = [short]
        else:
            lines = [*lines[:-1], lines[-1].rstrip("\n") + ",\n", f'            "{source}",\n']
        fingerprint = f"        Fingerprint(\n{''.join(lines)}        ),\n"
    return (
        f"    {finding.field}=Target(\n"
        f'        "{target.module}",\n        "{target.name}",\n{fingerprint}    ),\n'
    )


def _trailing_blanks(pieces: Sequence[str]) -> list[str]:
    moved = [piece.lstrip() for piece in pieces]
    for index, piece in enumerate(pieces[1:]):
        moved[index] += piece[: len(piece) - len(piece.lstrip())]
    return moved


def _quoted(text: str) -> str:
    if '"' not in text and "\\" not in text:
        return f'"{text}"'
    return repr(text)
