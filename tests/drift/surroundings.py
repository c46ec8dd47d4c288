# SPDX-License-Identifier: Apache-2.0
"""What vLLM has around the patches: who imports the functions, who checks the classes, and more.

Everything here is compared by name between two releases, and is to be read. The plugin finds who
holds a function by itself, if it is the global of a module.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.drift import names
from tests.drift.names import Change
from tests.drift.release import Release
from tests.drift.sources import Sources
from tests.drift.uses import Subclass
from vllm_hybrid_kv.patches.base import Target

WATCHED = {
    ("vllm.plugins", "load_general_plugins"): "loads the plugin, once in every process",
    ("vllm.platforms.interface", "Platform.update_block_size_for_backend"): "sets the block size "
    "that page sizes are planned from",
    ("vllm.platforms.interface", "Platform._align_hybrid_block_size"): "grows the blocks of hybrid "
    "models, with the slot bytes of vLLM's own TurboQuant backend",
    (
        "vllm.v1.attention.backends.turboquant_attn",
        "TurboQuantAttentionBackend.customize_spec",
    ): "plans the slot bytes in the above",
    ("vllm.v1.core.kv_cache_utils", "update_kv_cache_capacity"): "calls get_kv_cache_capacity",
    ("vllm.v1.engine.core", "EngineCore._initialize_kv_caches"): "plans, and reports the capacity",
    ("vllm.config.cache", "CacheDType"): "lists the cache dtypes that the command line takes",
}
"""What the plugin relies on without naming it in its code, and for what."""

# Ways in that vLLM gives to others. Of backends and of models there are too many.
_WAYS_IN = re.compile(
    r"^\s*(?:def|class) ((?:register_|get_)\w+|[A-Z]\w*(?:Registry|Builder))\b", re.MULTILINE
)
_NO_WAYS_IN = re.compile(r"^get_(?!\w+_cls$)|MetadataBuilder$|DummyInputsBuilder$|^register_buffer")
_ELSEWHERE = (
    "vllm.models.",
    "vllm.model_executor.models.",
    "vllm.entrypoints.",
    "vllm.third_party.",
)


@dataclass(frozen=True)
class Holder:
    """A module that imports a function that is rebound.

    Attributes:
        function: The function's name.
        module: The module.
        how: `at the top`, `inside a function`, or `kept as a value in line …`: then the rebinding
            may not reach it.
    """

    function: str
    module: str
    how: str


def holders(sources: Sources, targets: Iterable[Target]) -> set[Holder]:
    """Return who imports the functions among some targets by name.

    Args:
        sources: The release's.
        targets: As they are in that release.
    """
    found = set()
    for target in targets:
        if "." in target.name:
            continue
        definition = sources.find(target.module, target.name)
        for module in sources.containing(target.name):
            for node, source, alias in sources.imports_from(module):
                if alias.name == target.name and sources.find(source, alias.name) == definition:
                    how = "at the top" if node.col_offset == 0 else "inside a function"
                    bound = alias.asname or alias.name
                    kept = [str(line) for line in _kept_as_value(sources.nodes(module), bound)]
                    if kept:
                        how = f"kept as a value in line {', '.join(kept)}"
                    found.add(Holder(target.name, module, how))
    return found


def _kept_as_value(nodes: Sequence[ast.AST], name: str) -> Iterator[int]:
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if (
            isinstance(node, ast.Name)
            and node.id == name
            and isinstance(node.ctx, ast.Load)
            and id(node) not in called
        ):
            yield node.lineno


def class_checks(sources: Sources, classes: Iterable[str]) -> set[tuple[str, str, str]]:
    """Return who checks for some classes or derives from them: class, module and how.

    Args:
        sources: The release's.
        classes: Names without module; vLLM has each once.
    """
    wanted = set(classes)
    found: set[tuple[str, str, str]] = set()
    if not wanted:
        return found
    # Most modules that name such a class do neither, and need not be parsed.
    name = rf"\b(?:{'|'.join(map(re.escape, sorted(wanted)))})\b"
    either = re.compile(rf"(?:(?:isinstance|issubclass)|class \w+)(\()[^:]*?{name}")
    for module in sources.matching(either).get("(", ()):
        if module.startswith(_ELSEWHERE):
            continue
        for node in sources.nodes(module):
            if isinstance(node, ast.Call) and _last(node.func) in ("isinstance", "issubclass"):
                checked = {_last(part) for part in ast.walk(node.args[-1])}
                found |= {(name, module, _last(node.func)) for name in checked & wanted}
            elif isinstance(node, ast.ClassDef):
                bases = {_last(_unsubscripted(base)) for base in node.bases}
                found |= {(name, module, f"base of {node.name}") for name in bases & wanted}
    return found


def _last(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _unsubscripted(node: ast.expr) -> ast.expr:
    return node.value if isinstance(node, ast.Subscript) else node


def ways_in(sources: Sources) -> dict[str, list[str]]:
    """Return functions and classes by which others can come in: by name, with their modules."""
    return {
        name: kept
        for name, modules in sources.matching(_WAYS_IN).items()
        if not _NO_WAYS_IN.search(name)
        and (kept := [module for module in modules if not module.startswith(_ELSEWHERE)])
    }


@dataclass(frozen=True)
class Surroundings:
    """How the surroundings differ between two releases. All in words.

    Attributes:
        holders: Modules that import a rebound function, that did not or do no longer.
        class_checks: Checks of, and derivations from, classes that the plugin derives from.
        ways_in: Registration points that are new or gone.
        watched: What the plugin relies on without naming it.
        requirements: Of the wheels.
    """

    holders: tuple[str, ...]
    class_checks: tuple[str, ...]
    ways_in: tuple[str, ...]
    watched: tuple[Change, ...]
    requirements: tuple[str, ...]


def compare(
    known: Release,
    release: Release,
    targets: Iterable[tuple[Target, Target | None]],
    subclasses: Iterable[Subclass],
) -> Surroundings:
    """Compare the surroundings.

    Args:
        known: The release that an adapter knows.
        release: The other one.
        targets: As they are in the one, and in the other.
        subclasses: The plugin's.
    """
    old, new = known.sources, release.sources
    pairs = list(targets)
    classes = {subclass.base[1] for subclass in subclasses}
    return Surroundings(
        _differences(
            holders(old, (before for before, _ in pairs)),
            holders(new, (after for _, after in pairs if after is not None)),
            lambda one: f"{one.function} imported by {one.module}, {one.how}",
        ),
        _differences(
            class_checks(old, classes),
            class_checks(new, classes),
            lambda one: f"{one[0]} in {one[1]}: {one[2]}",
        ),
        _differences(
            {(name, *modules[:1]) for name, modules in ways_in(old).items()},
            {(name, *modules[:1]) for name, modules in ways_in(new).items()},
            lambda one: f"{one[0]} in {one[1]}",
        ),
        tuple(_watched(old, new)),
        tuple(_requirements(known, release)),
    )


def _differences(old: set[Any], new: set[Any], say: Callable[[Any], str]) -> tuple[str, ...]:
    return (
        *sorted(f"new: {say(one)}" for one in new - old),
        *sorted(f"gone: {say(one)}" for one in old - new),
    )


def _watched(old: Sources, new: Sources) -> Iterator[Change]:
    for (module, name), why in WATCHED.items():
        before, after = old.find(module, name), new.find(module, name)
        if before is not None:
            if after is None:
                yield names.gone_name(f"{module}.{name}", before, new, (why,))
            else:
                yield from names.compare_definitions(before, after, (why,))


def _requirements(known: Release, release: Release) -> Iterator[str]:
    for package in ("torch", "triton", "transformers", "numba"):
        before, after = known.requirement(package), release.requirement(package)
        if before != after:
            yield f"{package}: {before or 'not required'} became {after or 'not required'}"
    before_python, after_python = (
        ", ".join(one.metadata.get("Requires-Python", ["any"])) for one in (known, release)
    )
    if before_python != after_python:
        yield f"Python: {before_python} became {after_python}"
