# SPDX-License-Identifier: Apache-2.0
"""The errors that stop start-up. Each message says what is wrong and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HybridKVError(ValueError):
    """Start-up cannot continue. The message is for the user who started vLLM."""


class HybridKVVersionError(HybridKVError):
    """The plugin does not support the installed version of vLLM."""


class HybridKVSettingsError(HybridKVError):
    """A setting is unknown or has an invalid value."""


class HybridKVKernelError(HybridKVError):
    """A kernel fails its known-answer test on this machine."""


class HybridKVStrategyError(HybridKVError):
    """A strategy could not be registered, failed, or returned an invalid result."""


class HybridKVPatchError(HybridKVError):
    """A function of vLLM could not be patched, or is no longer patched."""


class HybridKVFingerprintError(HybridKVPatchError):
    """The source of a vLLM function is not one that the plugin supports. Nothing was patched."""


class HybridKVAgreementError(HybridKVError):
    """The plugin's version, or whether it is active, differs between a process and its parent."""


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return `"; did you mean 'lcm'?"` for the closest known word, or an empty string.

    `cutoff` is the lowest similarity that counts, from 0 to 1, as in `difflib.get_close_matches`.
    """
    close = difflib.get_close_matches(word, list(known), 1, cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""
