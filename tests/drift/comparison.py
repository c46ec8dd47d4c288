# SPDX-License-Identifier: Apache-2.0
"""Everything that is compared, by adapter, and what each adapter needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.drift import names, proposal, surroundings, targets
from tests.drift.adapters import Adapter
from tests.drift.names import Change
from tests.drift.release import Minor, Release
from tests.drift.surroundings import Surroundings
from tests.drift.targets import BODY, GONE, MOVED, SIGNATURE, UNREADABLE, Finding
from tests.drift.uses import Uses
from vllm_hybrid_kv.patches import ADAPTERS


@dataclass(frozen=True)
class Comparison:
    """How an adapter compares with a release.

    Attributes:
        adapter: The adapter.
        release: The release.
        findings: For each of the functions that it rebinds.
        names: What the plugin uses beside, and what it derives from, where that has changed.
        surroundings: None where the release that the adapter knows is not at hand, or is this one.
    """

    adapter: Adapter
    release: Release
    findings: tuple[Finding, ...]
    names: tuple[Change, ...]
    surroundings: Surroundings | None

    @property
    def fits(self) -> bool:
        """Whether the adapter can be used as it is."""
        return not self.moved and not self.broken

    @property
    def moved(self) -> list[Finding]:
        """What is not as the adapter knows it."""
        return [finding for finding in self.findings if finding.kinds]

    @property
    def broken(self) -> list[Change]:
        """What else the plugin cannot go on with."""
        watched = self.surroundings.watched if self.surroundings is not None else ()
        return [change for change in (*self.names, *watched) if change.breaks]

    def count(self, kind: str) -> int:
        """Return in how many functions something of a kind has changed."""
        return Counter(kind for finding in self.findings for kind in finding.kinds)[kind]

    def proposed(self) -> str:
        """Return the source of the adapter for the release, as far as it can be told."""
        return proposal.adapter_module(self.adapter, self.findings, self.release.version)

    def steps(self) -> Iterator[str]:
        """Yield what is to be done for the release, one line each."""
        minor = self.release.minor
        if self.moved:
            name = "v{}_{}".format(*minor)
            if minor != self.adapter.minor and minor in ADAPTERS:
                yield f"vLLM {self.release.version} has an adapter of its own, {name}"
            elif minor != self.adapter.minor:
                yield (
                    f"write vllm_hybrid_kv/patches/{name}.py after {self.adapter.name}.py, add it "
                    "to ADAPTERS (patches/__init__.py), and raise the bounds of the extras cpu and "
                    "cuda in setup.cfg"
                )
            elif self.adapter.known is not None:
                yield (
                    f"{self.adapter.name} knows {self.adapter.known.version}, and one adapter "
                    f"serves its whole minor: decide between the two releases"
                )
        for finding in self.moved:
            yield f"{finding.field}: {'; '.join(_needs(finding))}"
        for change in self.broken:
            users = ", ".join(change.used_in[:3])
            yield f"{change.name} ({users}): {change.kind}; {change.detail}"


def _needs(finding: Finding) -> Iterator[str]:
    now, fingerprint = finding.now, finding.target.fingerprint
    if GONE in finding.kinds:
        near = ", ".join(finding.nearest) or "none"
        yield f"gone; nearest names: {near}"
    if UNREADABLE in finding.kinds:
        yield f"cannot be read: {finding.error}"
    if now is None:
        return
    if MOVED in finding.kinds:
        old = "can be imported from" if finding.still_importable else "is gone from"
        yield f"moved to {now.module} {now.name}, {old} {finding.target.module}"
    if SIGNATURE in finding.kinds:
        parts = [f"came {', '.join(finding.came)}"] if finding.came else []
        parts += [f"went {', '.join(finding.went)}"] if finding.went else []
        yield f"signature: {', '.join(parts) or 'in another order'}"
    if BODY in finding.kinds:
        yield f"source {fingerprint.source}, now {now.fingerprint.source}"
        if finding.field in proposal.DECIDES:
            yield f"{proposal.DECIDES[finding.field]} follows from it"


def compare(
    adapters: Sequence[Adapter], release: Release, uses: Uses, against: Minor | None = None
) -> tuple[Comparison, list[Comparison]]:
    """Compare adapters with a release, one of them in full.

    Args:
        adapters: The adapters.
        release: The release.
        uses: What the plugin uses of vLLM.
        against: The minor of that one; None for the closest.

    Returns:
        That one, with names and surroundings; all, in the order of the adapters.

    Raises:
        DriftError: The release cannot be imported.
    """
    found = [
        Comparison(adapter, release, tuple(findings), (), None)
        for adapter, findings in zip(adapters, targets.compare(adapters, release), strict=True)
    ]
    asked_for = [one for one in found if against in (None, one.adapter.minor)]
    # Of two that are as close, the later one.
    chosen = min(asked_for, key=lambda one: (_distance(one), -one.adapter.minor[1]))
    full = in_full(chosen, uses)
    return full, [full if one is chosen else one for one in found]


def _distance(comparison: Comparison) -> int:
    """Return how far an adapter is away: what has changed, and what is lost much more."""
    weights = {GONE: 10, UNREADABLE: 10}
    return sum(weights.get(kind, 1) for one in comparison.findings for kind in one.kinds)


def in_full(comparison: Comparison, uses: Uses) -> Comparison:
    """Return a comparison with names and surroundings.

    Args:
        comparison: One without.
        uses: What the plugin uses of vLLM.
    """
    adapter, release = comparison.adapter, comparison.release
    known = adapter.known
    old = None if known is None else known.sources
    found = [
        *names.compare_names(uses, old, release.sources),
        *names.compare_bases(uses.subclasses, old, release.sources),
    ]
    # A member of a base may be read of objects, too.
    changes = {(change.name, change.kind): change for change in found}.values()
    around = None
    if known is not None and old is not release.sources:
        pairs = [(finding.target, finding.now) for finding in comparison.findings]
        around = surroundings.compare(known, release, pairs, uses.subclasses)
    return Comparison(adapter, release, comparison.findings, tuple(changes), around)
