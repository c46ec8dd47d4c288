# SPDX-License-Identifier: Apache-2.0
"""One engine prefills and another one decodes: k8v4 pages arrive unchanged, or not at all.

The tests use two connectors of vLLM. ExampleConnector writes pages to a folder. NIXL copies pages
from the memory of one process into that of another; `make long-tests` installs its package.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from testing.engine_host import EngineHost, HandedOver, Pages
from testing.model_cases import Case, assert_same, case_of, settings
from testing.tokenizer import random_prompt

pytestmark = pytest.mark.engine

PROMPTS = [random_prompt(length, seed=length) for length in (700, 333, 300, 140, 40)]
TOKENS = 8
ENOUGH = len(PROMPTS) * TOKENS // 2
NO_PARAMS = [None] * len(PROMPTS)
CASE = case_of("llama")

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
"""Parameters that tell an engine to keep a prompt's pages until another engine has read them."""

Start = Callable[..., EngineHost]


@pytest.fixture(scope="module")
def start(small_model: Callable[..., Path]) -> Start:
    """A function that starts an engine with the given connector and role in a host."""

    def run(host: EngineHost, connector: str, role: str, case: Case = CASE, **more: Any) -> Any:
        options = more.pop("options", {})
        transfer = {
            "kv_connector": connector,
            "kv_role": role,
            "kv_connector_extra_config": options,
        }
        model = small_model(case.model, case.dtype)
        return host.engine(**settings(model, case.dtype, kv_transfer_config=transfer, **more))

    return run


# ExampleConnector


@dataclass(frozen=True)
class Folder:
    """What one engine wrote to a folder for some prompts, and what another engine read from it."""

    path: Path
    block: int
    first: list[HandedOver]
    second: list[HandedOver]
    written: Pages
    read: Pages

    def stored(self, prompt: list[int]) -> int:
        """Return how many full blocks ExampleConnector reuses, without the last two tokens."""
        return max(len(prompt) - 2, 0) // self.block


@pytest.fixture(scope="module")
def folder(host: EngineHost, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("pages")

    def run(role: str) -> tuple[list[HandedOver], Pages]:
        start(host, "ExampleConnector", role, options={"shared_storage_path": str(path)})
        handed = host.hand_over(PROMPTS, TOKENS, NO_PARAMS)
        return handed, [host.pages(request.blocks)[0] for request in handed]

    first, written = run("kv_producer")
    second, read = run("kv_consumer")
    return Folder(path, host.started["block_size"], first, second, written, read)


def test_an_engine_that_reads_a_folder_gives_the_same_answers(folder: Folder) -> None:
    expected = [request.output for request in folder.first]
    outputs = [request.output for request in folder.second]
    assert [output.cached for output in expected] == [0] * len(PROMPTS)
    assert_same(outputs, expected, CASE, decisive=ENOUGH)
    cached = [output.cached for output in outputs]
    assert cached == [folder.stored(prompt) * folder.block for prompt in PROMPTS]
    assert cached[0] == 640


def test_pages_cross_a_folder_byte_for_byte(folder: Folder) -> None:
    for prompt, written, read in zip(PROMPTS, folder.written, folder.read, strict=True):
        whole = folder.stored(prompt)
        for layer, pages in written.items():
            assert pages[:whole] == read[layer][:whole]
            assert all(any(page) for page in pages[:whole])


def test_the_folder_describes_its_pages_in_a_subfolder_for_their_format(folder: Folder) -> None:
    (own,) = folder.path.iterdir()
    fields = json.loads((own / "hybrid_kv.json").read_text())
    assert own.name.startswith("hybrid_kv-")
    assert (fields["page_format"], fields["page_tokens"], fields["kv_heads"]) == (2, 128, 2)
    assert len(list((own / "0of1").iterdir())) == len(PROMPTS)


# NIXL


@pytest.fixture(scope="module")
def nixl_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A function that starts, once per port, a process whose engines use NIXL on that port."""
    pytest.importorskip("nixl", reason="make long-tests installs NIXL")
    with contextlib.ExitStack() as stack:

        @cache
        def start(port: int, **environment: str) -> EngineHost:
            log = tmp_path_factory.mktemp(f"port-{port}") / "log.txt"
            host = EngineHost(log, VLLM_NIXL_SIDE_CHANNEL_PORT=str(port), **environment)
            stack.callback(host.close)
            return host

        yield start


def cross(
    prefill: EngineHost, decode: EngineHost, case: Case = CASE, same_answers: bool = True
) -> int:
    """Prefill on one engine, decode on the other, and compare outputs and pages.

    The processes of an engine have different pages. Each process of the decoding engine must have
    received the pages of its own peer. Returns how many processes each engine has.
    """
    expected = decode.generate(PROMPTS, TOKENS, alone=True, fresh=True)
    assert decode.generate([random_prompt(3, seed=0)], 1, fresh=True)
    sent = prefill.hand_over(PROMPTS, 1, [PREFILL] * len(PROMPTS))
    answered = decode.hand_over(PROMPTS, TOKENS, [request.params for request in sent])
    outputs = [request.output for request in answered]
    if same_answers:
        assert_same(outputs, expected, case, decisive=ENOUGH)
    else:
        # The hand-over splits prompts into chunks, and states are rounded between chunks. That
        # changes many close choices, so compare only first tokens that led by 0.8 or more.
        for output, wanted in zip(outputs, expected, strict=True):
            assert output.tokens[:1] == wanted.tokens[:1] or wanted.margins[0] < 0.8
    for request, of_prompt in zip(answered, sent, strict=True):
        everywhere = prefill.pages(tuple(of_prompt.params["remote_block_ids"]))
        for layers, arrived in zip(everywhere, request.arrived, strict=True):
            assert set(layers) == set(arrived)
            for layer, pages in layers.items():
                # Only the last states and the last pages of a window are sent.
                assert pages == arrived[layer][-len(pages) :]
                assert any(pages[-1])
        assert all(one != everywhere[0] for one in everywhere[1:])
    return len(everywhere)


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama", "qwen3-next", "gemma3"])
def test_pages_and_states_cross_memory_byte_for_byte(
    name: str, nixl_host: Start, start: Start
) -> None:
    case = case_of(name)
    prefill = start(nixl_host(24560), "NixlConnector", "kv_producer", case)
    decode = start(nixl_host(24570), "NixlConnector", "kv_consumer", case)
    assert cross(prefill, decode, case, same_answers=name != "qwen3-next") == 1


@pytest.mark.long
def test_pages_cross_between_engines_of_two_processes_each(
    nixl_host: Start, start: Start, nobind: None
) -> None:
    prefill, decode = (
        start(nixl_host(port), "NixlConnector", role, tensor_parallel_size=2)
        for port, role in ((24600, "kv_producer"), (24620, "kv_consumer"))
    )
    assert cross(prefill, decode) == 2
    # Even idle, the processes of an engine would keep their cores busy.
    prefill.stop()
    decode.stop()


@pytest.mark.long
@pytest.mark.parametrize(
    ("port", "environment", "more", "local"),
    [
        (24580, {"VLLM_PLUGINS": ""}, {}, "[0-9a-f]{64}, "),
        (
            *(24590, {}, {"block_size": 64}),
            r"[0-9a-f]{64} \[hybrid_kv .*: k8v4 format 2, .* pages of 64 tokens, .*\], ",
        ),
    ],
    ids=["without the plugin", "other pages"],
)
def test_a_peer_that_cannot_read_the_pages_refuses_with_an_explanation(
    nixl_host: Start,
    start: Start,
    port: int,
    environment: dict[str, str],
    more: dict[str, int],
    local: str,
) -> None:
    prefill = start(nixl_host(24560), "NixlConnector", "kv_producer")
    peer = start(nixl_host(port, **environment), "NixlConnector", "kv_consumer", **more)
    (sent,) = prefill.hand_over(PROMPTS[:1], 1, [PREFILL])
    (refused,) = peer.hand_over(PROMPTS[:1], TOKENS, [sent.params])
    assert refused.output.tokens == []
    remote = r"[0-9a-f]{64} \[hybrid_kv .*: k8v4 format 2, .* pages of 128 tokens, .*\]"
    words = rf"NIXL compatibility hash mismatch\. Local: {local}Remote: {remote}"
    assert re.search(words, peer.log.read_text(errors="replace"))
