# SPDX-License-Identifier: Apache-2.0
"""One engine reads prompts and another one answers: k8v4 pages cross byte for byte, or not at all.

Through vLLM's own connectors: ExampleConnector, which leaves pages in a folder, and NIXL, which
copies them from one process's memory into another's. NIXL is a package of its own, which
`make long-tests` installs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from testing.engine_host import EngineHost
from testing.handed_over import Handed
from testing.requests import Output
from testing.workload import CASES, Case, random_prompt, settings

pytestmark = pytest.mark.engine

PROMPTS = [random_prompt(length, seed=length) for length in (700, 333, 300, 140, 40)]
TOKENS = 8
ENOUGH = len(PROMPTS) * TOKENS // 2

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
"""Asks an engine to keep a prompt's pages for another one."""

Pages = dict[str, list[bytes]]


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of("llama")


def case_of(model: str) -> Case:
    return next(case for case in CASES if case.model == model)


def transfer(connector: str, role: str, **options: Any) -> dict[str, Any]:
    return {"kv_connector": connector, "kv_role": role, "kv_connector_extra_config": options}


def assert_same_answers(handed: list[Handed], expected: list[Output], case: Case) -> None:
    """Assert equal tokens up to the first choice that was close; no fewer than `ENOUGH` in all."""
    farthest = case.rounding if case.farthest is None else case.farthest
    compared = 0
    for got, wanted in zip(handed, expected, strict=True):
        close = [margin <= 2 * case.rounding for margin in wanted.margins]
        count = close.index(True) if True in close else len(close)
        assert got.output.tokens[:count] == wanted.tokens[:count]
        for a, b in zip(got.output.logprobs[:count], wanted.logprobs[:count], strict=True):
            assert abs(a - b) <= farthest
        compared += count
    assert compared >= ENOUGH


@dataclass(frozen=True)
class Folder:
    """Prompts that an engine answered and left in a folder, and another engine answered from it."""

    path: Path
    block: int
    first: list[Handed]
    second: list[Handed]
    written: list[Pages]
    found: list[Pages]


@pytest.fixture(scope="module")
def folder(
    host: EngineHost,
    case: Case,
    small_model: Callable[[str, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Folder:
    path = tmp_path_factory.mktemp("pages")

    def run(role: str) -> tuple[list[Handed], list[Pages]]:
        connector = transfer("ExampleConnector", role, shared_storage_path=str(path))
        model = small_model(case.model, case.dtype)
        engine = host.engine(**settings(model, case, kv_transfer_config=connector))
        handed = engine.hand_over(PROMPTS, TOKENS, [None] * len(PROMPTS))
        return handed, [engine.pages(request.blocks)[0] for request in handed]

    first, written = run("kv_producer")
    second, found = run("kv_consumer")
    return Folder(path, host.started["block_size"], first, second, written, found)


def stored_tokens(prompt: list[int], block: int) -> int:
    """How much of a prompt ExampleConnector finds again: whole blocks, and not the last token."""
    return max(len(prompt) - 2, 0) // block * block


def test_a_folder_gives_another_engine_the_prompts_and_the_answers_are_the_same(folder, case):
    expected = [request.output for request in folder.first]
    assert [output.cached for output in expected] == [0] * len(PROMPTS)
    assert_same_answers(folder.second, expected, case)
    found = [request.output.cached for request in folder.second]
    assert found == [stored_tokens(prompt, folder.block) for prompt in PROMPTS]
    assert found[0] == 640


def test_pages_cross_a_folder_byte_for_byte(folder):
    for prompt, written, found in zip(PROMPTS, folder.written, folder.found, strict=True):
        whole = stored_tokens(prompt, folder.block) // folder.block
        for layer, pages in written.items():
            assert pages[:whole] == found[layer][:whole]
            assert all(any(page) for page in pages[:whole])


def test_the_folder_says_what_its_pages_are_and_has_them_where_only_such_engines_look(folder):
    (own,) = folder.path.iterdir()
    fields = json.loads((own / "hybrid_kv.json").read_text())
    assert own.name.startswith("hybrid_kv-")
    assert (fields["page_format"], fields["page_tokens"], fields["kv_heads"]) == (1, 128, 2)
    assert len(list((own / "0of1").iterdir())) == len(PROMPTS)


@pytest.mark.long
def test_an_engine_without_the_plugin_reads_nothing_of_the_folder(
    folder, case, small_model, tmp_path
):
    path = str(folder.path)
    connector = transfer("ExampleConnector", "kv_both", shared_storage_path=path)
    model = small_model(case.model, case.dtype)
    stock = {"kv_cache_dtype": "auto", "kv_transfer_config": connector}
    before = {file for file in folder.path.rglob("*") if file.is_file()}
    host = EngineHost(tmp_path / "log.txt", VLLM_PLUGINS="")
    try:
        engine = host.engine(**settings(model, case, **stock))
        alone = engine.hand_over(PROMPTS, TOKENS, [None] * len(PROMPTS))
    finally:
        host.close()
    assert [request.output.cached for request in alone] == [0] * len(PROMPTS)
    # It leaves its own pages beside ours.
    assert before < {file for file in folder.path.rglob("*") if file.is_file()}


# NIXL


def talking(log: Path, port: int, **environment: str) -> EngineHost:
    """Start a host whose engines talk NIXL on a port."""
    if importlib.util.find_spec("nixl") is None:
        pytest.skip("NIXL is not installed; make long-tests does that")
    return EngineHost(log, VLLM_NIXL_SIDE_CHANNEL_PORT=str(port), **environment)


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., EngineHost]]:
    """Starts engines that talk NIXL, each in a process that stays."""
    hosts: dict[str, EngineHost] = {}

    def start(name: str, port: int, **environment: str) -> EngineHost:
        if name not in hosts:
            hosts[name] = talking(tmp_path_factory.mktemp(name) / "log.txt", port, **environment)
        return hosts[name]

    yield start
    for host in hosts.values():
        host.close()


@pytest.fixture(scope="module")
def prefill(engines: Callable[..., EngineHost]) -> EngineHost:
    return engines("prefill", 24560)


@pytest.fixture(scope="module")
def decode(engines: Callable[..., EngineHost]) -> EngineHost:
    return engines("decode", 24570)


def started(host: EngineHost, role: str, model: Path, case: Case, **more: Any) -> EngineHost:
    connector = transfer("NixlConnector", role)
    return host.engine(**settings(model, case, kv_transfer_config=connector, **more))


def kept(handed: list[Handed]) -> list[tuple[list[int], ...]]:
    """The blocks that an engine keeps of each prompt, by KV group."""
    return [tuple(request.params["remote_block_ids"]) for request in handed]


def assert_crossed(prefill: EngineHost, read: list[Handed], answered: list[Handed]) -> int:
    """Assert that each process has what its peer keeps, and other bytes than its siblings.

    Returns:
        The processes of an engine.
    """
    for request, blocks in zip(answered, kept(read), strict=True):
        everywhere = prefill.pages(blocks)
        for sent, arrived in zip(everywhere, request.arrived, strict=True):
            assert set(sent) == set(arrived)
            for layer, pages in sent.items():
                # Of states and windows only what is still needed is sent: the last ones.
                assert pages == arrived[layer][-len(pages) :]
                assert any(pages[-1])
        assert all(one != everywhere[0] for one in everywhere[1:])
    return len(everywhere)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "qwen3-next", "gemma3"])
def test_pages_and_states_cross_from_memory_to_memory_byte_for_byte(
    name, prefill, decode, small_model
):
    case = case_of(name)
    model = small_model(case.model, case.dtype)
    # Unquantised layers would have other pages, and NIXL takes none that are padded.
    alike = {"hybrid_kv": {"boundary_layers": 0}} if name == "gemma3" else {}
    started(prefill, "kv_producer", model, case, additional_config=alike)
    started(decode, "kv_consumer", model, case, additional_config=alike)
    expected = decode.generate(PROMPTS, TOKENS, alone=True, fresh=True)
    assert decode.generate([random_prompt(3, seed=0)], 1, fresh=True)

    read = prefill.hand_over(PROMPTS, 1, [PREFILL] * len(PROMPTS))
    answered = decode.hand_over(PROMPTS, TOKENS, [request.params for request in read])
    if name != "qwen3-next":
        assert_same_answers(answered, expected, case)
    else:
        # Whether a state was rounded between two chunks moves it by more than many choices.
        for got, wanted in zip(answered, expected, strict=True):
            assert got.output.tokens[:1] == wanted.tokens[:1] or wanted.margins[0] < 0.8
    assert assert_crossed(prefill, read, answered) == 1


@pytest.fixture
def of_two_processes(tmp_path: Path) -> Iterator[list[EngineHost]]:
    """Hosts of two engines of two processes each, which are not left to spin beside others."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for name, port in (("prefill", 24600), ("decode", 24620)):
            # A thread each, on whatever cores there are.
            host = talking(tmp_path / f"{name}.txt", port, VLLM_CPU_OMP_THREADS_BIND="nobind")
            stack.callback(host.close)
            hosts.append(host)
        yield hosts


@pytest.mark.long
def test_pages_cross_between_engines_of_two_processes_each(of_two_processes, case, small_model):
    prefill, decode = of_two_processes
    model = small_model(case.model, case.dtype)
    started(prefill, "kv_producer", model, case, tensor_parallel_size=2)
    started(decode, "kv_consumer", model, case, tensor_parallel_size=2)
    expected = decode.generate(PROMPTS, TOKENS, alone=True, fresh=True)
    assert decode.generate([random_prompt(3, seed=0)], 1, fresh=True)

    read = prefill.hand_over(PROMPTS, 1, [PREFILL] * len(PROMPTS))
    answered = decode.hand_over(PROMPTS, TOKENS, [request.params for request in read])
    assert_same_answers(answered, expected, case)
    assert assert_crossed(prefill, read, answered) == 2


@pytest.mark.long
@pytest.mark.parametrize("peer", ["without the plugin", "other pages"])
def test_a_peer_that_cannot_read_the_pages_refuses_in_words(
    peer, engines, prefill, case, small_model
):
    model = small_model(case.model, case.dtype)
    started(prefill, "kv_producer", model, case)
    if peer == "without the plugin":
        host = started(engines(peer, 24580, VLLM_PLUGINS=""), "kv_consumer", model, case)
        local = "[0-9a-f]{64}, "
    else:
        host = started(engines(peer, 24590), "kv_consumer", model, case, block_size=64)
        local = r"[0-9a-f]{64} \[hybrid_kv .*: k8v4 format 1, .* pages of 64 tokens, .*\], "
    read = prefill.hand_over(PROMPTS[:1], 1, [PREFILL])
    (refused,) = host.hand_over(PROMPTS[:1], TOKENS, [read[0].params])
    assert refused.output.tokens == []
    remote = r"[0-9a-f]{64} \[hybrid_kv .*: k8v4 format 1, .* pages of 128 tokens, .*\]"
    words = rf"NIXL compatibility hash mismatch\. Local: {local}Remote: {remote}"
    assert re.search(words, host.log.read_text(errors="replace"))
