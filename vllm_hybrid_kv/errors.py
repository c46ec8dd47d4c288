# SPDX-License-Identifier: Apache-2.0
"""The errors that stop start-up. Each carries one message that says what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HybridKVError(ValueError):
    """Start-up cannot go on. The message is for the person who started vLLM."""


class HybridKVVersionError(HybridKVError):
    """This vLLM is not one that the plugin knows."""


class HybridKVSettingsError(HybridKVError):
    """A setting is unknown or has a value that is not valid."""


class HybridKVKernelError(HybridKVError):
    """A kernel fails its known-answer test on this machine."""


class HybridKVStrategyError(HybridKVError):
    """A strategy could not be registered, failed, or gave an answer that cannot be used."""


class HybridKVPatchError(HybridKVError):
    """What the plugin rebinds in vLLM is not what it knows, or did not stay rebound."""


class HybridKVFingerprintError(HybridKVPatchError):
    """What the plugin would rebind is not what it knows. Nothing was changed."""


class HybridKVAgreementError(HybridKVError):
    """A process of an engine has another plugin than the one that started it."""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `"; did you mean 'lcm'?"` for the closest known word; empty if none is close.

    Args:
        word: What the user wrote.
        known: The valid words.
        cutoff: The least similarity, from 0 to 1, as in `difflib.get_close_matches`.
    """
    close = difflib.get_close_matches(word, list(known), 1, cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""
