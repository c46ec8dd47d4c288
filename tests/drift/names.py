# SPDX-License-Identifier: Apache-2.0
"""What became of the names that the plugin uses, and of the classes that it derives from."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.drift.sources import Definition, FunctionNode, Sources
from tests.drift.targets import BODY, GONE, MOVED, SIGNATURE, arguments, diff, elsewhere
from tests.drift.uses import Subclass, Uses

ABSTRACT, NEW = "abstract", "new"


@dataclass(frozen=True)
class Change:
    """What became of a name.

    Attributes:
        name: With its module.
        kind: `gone`, `moved`, `signature`, `body`, `abstract` or `new`.
        detail: In words.
        used_in: Files or classes of the plugin's.
        breaks: Whether the plugin cannot go on as it is; else it is to be read.
        diff: Of the source.
    """

    name: str
    kind: str
    detail: str
    used_in: tuple[str, ...]
    breaks: bool
    diff: tuple[str, ...] = ()


def compare_names(uses: Uses, old: Sources | None, new: Sources) -> list[Change]:
    """Compare the names that the plugin imports.

    Args:
        uses: The plugin's.
        old: The release that is known; None where it is not at hand: then only what is gone is
            found.
        new: The other one.
    """
    changes: dict[tuple[str, str], Change] = {}
    bases = {subclass.base for subclass in uses.subclasses}
    for (module, name), files in sorted(uses.names.items()):
        before = None if old is None else follow(old, module, name)
        after = follow(new, module, name)
        used_in = tuple(files)
        found: list[Change] = []
        if after is None:
            # What stands in a class or is made while a module runs cannot be told from the files.
            if before is not None or (old is None and "." not in name):
                found = [gone_name(f"{module}.{name}".strip("."), before, new, used_in)]
        elif before is not None and isinstance(after.node, ast.ClassDef):
            if (before.module, before.name) not in bases:
                found = list(_class_changes(uses, before, after, old, new, used_in))
        elif before is not None:
            found = list(compare_definitions(before, after, used_in))
        for change in found:
            changes.setdefault((change.name, change.kind), change)
    return list(changes.values())


def follow(sources: Sources, module: str, name: str) -> Definition | None:
    """Return the definition of a name; of the longest part of it that the files can tell of.

    Args:
        sources: Of the release.
        module: The module.
        name: With dots for members; empty for the module itself.
    """
    if not name:
        return Definition(module, "", None, "") if module in sources.files else None
    parts = name.split(".")
    found = None
    for end in range(1, len(parts) + 1):
        if parts[end - 1].startswith("__"):
            return found or follow(sources, module, "")
        found = sources.find(module, ".".join(parts[:end]))
        if found is None or (found.node is not None and not isinstance(found.node, ast.ClassDef)):
            return found
    return found


def breaks_callers(old: Sequence[str], new: Sequence[str]) -> bool:
    """Whether calls may fail that did not: a parameter is gone, in another place, or required."""
    names = [parameter.partition("=")[0] for parameter in new]
    before = [parameter.partition("=")[0] for parameter in old]
    required = [parameter for parameter in new if "=" not in parameter and parameter[0] != "*"]
    was_required = {parameter for parameter in old if "=" not in parameter}
    return names[: len(before)] != before or not set(required) <= was_required


def compare_bases(
    subclasses: Sequence[Subclass], old: Sources | None, new: Sources
) -> list[Change]:
    """Compare vLLM's classes that the plugin derives from, as far as it concerns its own.

    Args:
        subclasses: The plugin's classes.
        old: The release that is known; None where it is not at hand.
        new: The other one.
    """
    changes: dict[tuple[str, str], Change] = {}
    for subclass in subclasses:
        after = new.find(*subclass.base)
        before = None if old is None or after is None else old.find(*subclass.base)
        if after is None:
            continue  # `compare_names` says so.
        found = list(_abstract(subclass, new.members(after)))
        if old is not None and before is not None:
            found += _base_changes(subclass, old.members(before), new.members(after))
            found += _new_members(subclass, after, old.members(before), new)
        for change in found:
            changes.setdefault((change.name, change.kind), change)
    return list(changes.values())


def gone_name(
    name: str, before: Definition | None, new: Sources, used_in: tuple[str, ...]
) -> Change:
    last = name.rpartition(".")[2]
    known = before if before is not None and isinstance(before.node, FunctionNode) else None
    is_member = before is not None and "." in before.name
    where = [] if is_member else [str(found) for found in elsewhere(new, last, known)][:3]
    detail = f"now in {', '.join(where)}" if where else "nowhere under this name"
    return Change(name, GONE, detail, used_in, breaks=True)


def compare_definitions(
    before: Definition, after: Definition, used_in: tuple[str, ...]
) -> Iterator[Change]:
    if (before.module, before.name) != (after.module, after.name):
        yield Change(str(before), MOVED, f"defined by {after}", used_in, breaks=False)
    if before.lines == after.lines:
        return
    lines = diff(before, after)
    if isinstance(before.node, FunctionNode) and isinstance(after.node, FunctionNode):
        old, new = arguments(before.node), arguments(after.node)
        if old != new:
            breaks = breaks_callers(old, new)
            yield Change(str(before), SIGNATURE, _parameters(old, new), used_in, breaks, lines)
            return
    count = sum(line[0] in "+-" and line[:3] not in ("+++", "---") for line in lines)
    yield Change(str(before), BODY, f"{count} lines of the diff", used_in, False, lines)


def _parameters(old: Sequence[str], new: Sequence[str]) -> str:
    came = [parameter for parameter in new if parameter not in old]
    went = [parameter for parameter in old if parameter not in new]
    parts = [f"came: {', '.join(came)}"] if came else []
    parts += [f"went: {', '.join(went)}"] if went else []
    return "; ".join(parts) or f"order: {', '.join(new)}"


def _class_changes(
    uses: Uses,
    before: Definition,
    after: Definition,
    old: Sources | None,
    new: Sources,
    used_in: tuple[str, ...],
) -> Iterator[Change]:
    """Compare the members of a class that the plugin names somewhere."""
    assert old is not None
    there, here = old.members(before), new.members(after)
    if (before.module, before.name) != (after.module, after.name):
        detail = f"defined by {after}, and can be imported as before"
        yield Change(str(before), MOVED, detail, used_in, breaks=False)
    for name in sorted(uses.attributes & there.keys()):
        if name.startswith("__"):
            continue
        member = f"{before}.{name}"
        if name not in here:
            detail = "the plugin reads an attribute of this name"
            yield Change(member, GONE, detail, used_in, breaks=True)
        else:
            yield from compare_definitions(there[name], here[name], used_in)


def _abstract(subclass: Subclass, members: dict[str, Definition]) -> Iterator[Change]:
    for name, member in members.items():
        if member.abstract and name not in subclass.defines:
            detail = f"{subclass.name} has to define it"
            yield Change(str(member), ABSTRACT, detail, (subclass.name,), breaks=True)


def _base_changes(
    subclass: Subclass, there: dict[str, Definition], here: dict[str, Definition]
) -> Iterator[Change]:
    who = (subclass.name,)
    for name in sorted((subclass.defines.keys() | subclass.asks_for) & there.keys()):
        ours = subclass.defines.get(name)
        if name not in here:
            detail = "it is overridden" if ours is not None else "it is asked for"
            yield Change(str(there[name]), GONE, f"{detail} by {subclass.name}", who, breaks=True)
            continue
        for change in compare_definitions(there[name], here[name], who):
            if change.kind == SIGNATURE and ours is not None:
                breaks = not _takes_anything(ours)
                detail = f"{change.detail}; overridden"
                yield Change(change.name, SIGNATURE, detail, who, breaks, change.diff)
            else:
                yield change


def _new_members(
    subclass: Subclass, after: Definition, there: dict[str, Definition], new: Sources
) -> Iterator[Change]:
    """Yield what could be overridden; what a method sets on `self` is no such thing."""
    classes = [one.node for one in new.lineage(after) if isinstance(one.node, ast.ClassDef)]
    statements = {id(node) for one in classes for node in one.body}
    names = sorted(
        name
        for name, member in new.members(after).items()
        if name not in there
        and name not in subclass.defines
        and name[0] != "_"
        and id(member.node) in statements
    )
    if names:
        detail = f"new, and could be overridden: {', '.join(names)}"
        yield Change(str(after), NEW, detail, (subclass.name,), breaks=False)


def _takes_anything(definition: Definition) -> bool:
    return isinstance(definition.node, FunctionNode) and (
        definition.node.args.vararg is not None and definition.node.args.kwarg is not None
    )
