# SPDX-License-Identifier: Apache-2.0
"""`python -m demo` serves a hybrid model over HTTP, and no process outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import demo.__main__ as demo_main
from demo.__main__ import Capacity
from testing.processes import ProcessError, start_group, wait_until

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 500.0
"""Longer than the demo waits for its server, so that the demo ends first."""
DEMO = [sys.executable, "-m", "demo"]


class Descendants:
    """The processes that a test started, directly or not.

    The kernel makes this process the parent of orphans: vLLM's engines write their title over
    their environment, so a variable could not mark them. Other tests have engines of their own.
    """

    def __init__(self) -> None:
        self._before = set(psutil.Process().children(recursive=True))

    def processes(self) -> list[psutil.Process]:
        """Return those that run, zombies excluded."""
        found = []
        parents = [psutil.Process()]
        while parents:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = set(parents.pop().children()) - self._before
                parents += children
                found += [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return found

    def commands(self) -> list[str]:
        """Return the command lines of those that run."""
        commands = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                commands.append(" ".join(process.cmdline()))
        return commands

    def end_within(self, seconds: float) -> bool:
        return wait_until(lambda: not self.commands(), seconds)

    def kill_all(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def adopt_orphans(wanted: bool) -> None:
    """Make this process the parent of orphans among its descendants, or not."""
    pr_set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, wanted, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


@pytest.fixture
def descendants() -> Iterator[Descendants]:
    """The processes that this test starts, which are killed when it ends."""
    # A shell's background jobs, and so these tests' processes, would ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    adopt_orphans(True)
    found = Descendants()
    yield found
    found.kill_all()
    adopt_orphans(False)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_process_starts_ends_that_process(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    number: signal.Signals,
    descendants: Descendants,
) -> None:
    class Interrupted(subprocess.Popen):
        def _execute_child(self, *arguments: Any, **more: Any) -> None:
            super()._execute_child(*arguments, **more)
            os.kill(os.getpid(), number)

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(number, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            start_group(["sleep", "600"], tmp_path / "log")
        assert signal.getsignal(number) is interrupt
    finally:
        signal.signal(number, before)
    assert descendants.end_within(5)


def test_these_tests_find_an_orphan_that_overwrites_its_environment(
    descendants: Descendants,
) -> None:
    titled = "import setproctitle, time; setproctitle.setproctitle('VLLM::EngineCore' + ' ' * 9000)"
    engine = [sys.executable, "-c", f"{titled}; time.sleep(600)"]
    server = f"import subprocess; subprocess.Popen({engine!r})"
    subprocess.run([sys.executable, "-c", server], start_new_session=True, check=True)
    assert wait_until(lambda: any(c.startswith("VLLM::") for c in descendants.commands()), 60)
    assert len(descendants.processes()) == 1
    # A test that begins now does not count it.
    assert not Descendants().commands()
    descendants.kill_all()
    assert descendants.end_within(5)


def test_the_table_shows_each_cache_in_its_own_row(capsys: pytest.CaptureFixture[str]) -> None:
    demo_main._show_capacity(k8v4=Capacity(2612, 128, 20), bf16=Capacity(1000, 64, 15))
    output = capsys.readouterr().out
    assert re.search(r"bf16\W+1,000\W+64\W+15\b", output)
    assert re.search(r"k8v4\W+2,612\W+128\W+20\b", output)
    assert "In requests of max_model_len k8v4 holds 2.61 times the tokens of bf16." in output


def test_an_empty_answer_is_an_error() -> None:
    with pytest.raises(ProcessError, match="chat, again: the server answered without any text"):
        demo_main._print_answer("chat, again", "a question", "", None)


def test_prompts_that_miss_the_prefix_cache_are_an_error() -> None:
    with pytest.raises(ProcessError, match="did not hit"):
        demo_main._show_prefix_cache(queries=1280, hits=0)


@pytest.mark.engine
def test_the_demo_serves_requests_and_leaves_no_process(descendants: Descendants) -> None:
    done = subprocess.run(
        DEMO, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    output = done.stdout
    assert done.returncode == 0, output + done.stderr
    assert "--kv-cache-dtype turboquant_k8v4" in output
    assert re.search(r"Plugin: hybrid_kv \S+ active on vLLM \S+ \(cpu\): .*kernels=cpu:", output)

    # An answer may be wrapped, and ends where the next section begins.
    answers = re.findall(
        r"^(chat|completion), (?:first time|again): .*\n  > .*\n  ([^:]+)\n(?=chat,|comp\w+,|KV)",
        output,
        re.M,
    )
    assert [kind for kind, _ in answers] == ["chat", "chat", "completion", "completion"]
    # The second time the pages come from the prefix cache.
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]
    assert len(answers[0][1].split()) > 5

    tokens, blocks = {}, {}
    for cache in ("bf16", "k8v4"):
        row = re.search(rf"{cache}\W+([\d,]+)\W+128\W+([\d,]+)", output)
        assert row is not None, output
        tokens[cache], blocks[cache] = (int(count.replace(",", "")) for count in row.groups())
    # A token and head takes 196 bytes instead of 512; both have 128 tokens a block.
    assert tokens["k8v4"] / tokens["bf16"] == pytest.approx(512 / 196, rel=0.01)
    assert blocks["k8v4"] / blocks["bf16"] == pytest.approx(512 / 196, rel=0.01)

    counted = re.search(r"Prefix cache: (\d+) of (\d+) prompt tokens were hits", output)
    assert counted is not None, output
    hits, queries = map(int, counted.groups())
    assert queries > hits >= 2 * 256

    assert "no process is left" in output
    assert not descendants.commands()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("stage", "number"), [("importing vLLM", signal.SIGINT), ("Ready", signal.SIGTERM)]
)
def test_an_interrupted_demo_ends_the_server_and_the_plan(
    stage: str, number: signal.Signals, descendants: Descendants
) -> None:
    demo = subprocess.Popen(
        DEMO, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if stage in line:
                break
        running = descendants.commands()
        assert any("vllm serve" in command for command in running), running
        if stage == "importing vLLM":
            assert any("vllm-hybrid-kv plan" in command for command in running), running
        demo.send_signal(number)
        rest = demo.communicate(timeout=60)[0]
        assert demo.returncode == 130, rest
        assert "Interrupted" in rest
        assert "Traceback" not in rest
        assert descendants.end_within(10)
    finally:
        demo.kill()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("code", "parts"),
    [
        (
            "main.SERVE_ARGUMENTS += ('--max-num-seqs', '0')",
            ("end of server.log", "max_num_seqs", "The demo failed: vllm serve ended"),
        ),
        (
            "main.PLAN_ARGUMENTS += ('--max-model-len', '-5')",
            (
                "end of bf16-plan.log",
                "--max-model-len: Input",
                "The demo failed: vllm-hybrid-kv plan",
            ),
        ),
    ],
    ids=["server", "plan"],
)
def test_a_failing_demo_shows_the_log_and_fails(
    descendants: Descendants, code: str, parts: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import demo.__main__ as main; {code}; raise SystemExit(main.main())",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for part in parts:
        assert part in done.stdout
    assert "Done in" not in done.stdout
    assert "Traceback" not in done.stderr
    assert not descendants.commands()
