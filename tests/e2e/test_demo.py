# SPDX-License-Identifier: Apache-2.0
"""The main job: `python -m demo` serves a hybrid model over HTTP and shows what came of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import demo.__main__ as demo_main
from demo.capacity import MARK, Capacity, planning
from testing.processes import ProcessError, start_group

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 500.0
"""Longer than the demo gives its server to start, so that the demo ends first."""
DEMO = [sys.executable, "-m", "demo"]


class Started:
    """The processes that a test started, and those that they did, whoever their parent is now.

    The kernel makes this process the parent of those whose own is gone: vLLM's engines write their
    title over their environment, and would not be known by a mark in it. Other tests have engines
    of their own, here and in processes beside this one.
    """

    def __init__(self) -> None:
        self._before = set(psutil.Process().children(recursive=True))

    def processes(self) -> list[psutil.Process]:
        """Return those that run, zombies aside."""
        found = []
        to_ask = [psutil.Process()]
        while to_ask:
            with contextlib.suppress(psutil.NoSuchProcess):
                children = set(to_ask.pop().children()) - self._before
                to_ask += children
                found += [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return found

    def left(self) -> list[str]:
        """Return the command lines of those that run."""
        commands = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                commands.append(" ".join(process.cmdline()))
        return commands

    def left_after(self, seconds: float) -> list[str]:
        """Wait for them to end, return the command lines of those that do not."""
        deadline = time.monotonic() + seconds
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.2)
        return self.left()

    def kill_all(self) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                group = os.getpgid(process.pid)
                if group == os.getpgid(0):
                    process.kill()
                else:
                    os.killpg(group, signal.SIGKILL)


def adopt_orphans(wanted: bool) -> None:
    """Have the kernel make this process the parent of orphans among its descendants, or not."""
    pr_set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, wanted, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def is_titled(command: str) -> bool:
    return command.startswith("VLLM::")


@pytest.fixture
def started() -> Iterator[Started]:
    """Know every process that this test starts, however it is started, and end them all."""
    # A shell's background jobs, tests among them, ignore Ctrl-C, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    adopt_orphans(True)
    found = Started()
    yield found
    found.kill_all()
    adopt_orphans(False)
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def fake_vllm(
    monkeypatch: pytest.MonkeyPatch, started: Started, tmp_path: Path
) -> Callable[[str], None]:
    """A function that puts a body of `LLM.__init__` in vLLM's place for processes started here."""

    def write(body: str) -> None:
        source = "class LLM:\n    def __init__(self, model, **arguments):\n"
        (tmp_path / "vllm.py").write_text(source + textwrap.indent(textwrap.dedent(body), " " * 8))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.chdir(ROOT)

    return write


def test_a_plan_is_read_from_the_engine(
    fake_vllm: Callable[[str], None], tmp_path: Path, started: Started
) -> None:
    fake_vllm("""
        from types import SimpleNamespace as Names
        print("as", model, "with", arguments)
        print("loading: 100%|", end="")
        cache = Names(kv_cache_size_tokens=1000, block_size=16, num_gpu_blocks=70)
        self.llm_engine = Names(vllm_config=Names(cache_config=cache))
    """)
    with planning(Path("some-model"), {"kv_cache_dtype": "auto"}, tmp_path / "log") as plan:
        assert plan.result() == Capacity(tokens=1000, block_size=16, num_blocks=70)
        plan.check()
    assert "as some-model with {'kv_cache_dtype': 'auto'}" in (tmp_path / "log").read_text()
    assert not started.left_after(5)


def test_a_failed_plan_is_noticed_and_points_to_its_log(
    fake_vllm: Callable[[str], None], tmp_path: Path
) -> None:
    fake_vllm("raise ValueError('no room for a cache')")
    with planning(Path("some-model"), {}, tmp_path / "log") as plan:
        with pytest.raises(ProcessError, match=r"did not plan a cache for \{\}") as caught:
            plan.result()
        assert caught.value.log is not None
        assert "ValueError: no room for a cache" in caught.value.log.read_text()
        with pytest.raises(ProcessError):
            plan.check()


def test_a_plan_that_says_nothing_is_an_error(
    fake_vllm: Callable[[str], None], tmp_path: Path
) -> None:
    fake_vllm("raise SystemExit(0)")
    with (
        planning(Path("some-model"), {}, tmp_path / "log") as plan,
        pytest.raises(ProcessError, match="without saying which") as caught,
    ):
        plan.result()
    assert caught.value.log == tmp_path / "log"
    assert MARK not in caught.value.log.read_text()


def test_an_interrupted_plan_ends_with_the_processes_that_it_started(
    fake_vllm: Callable[[str], None], tmp_path: Path, started: Started
) -> None:
    fake_vllm("""
        import subprocess, time
        subprocess.Popen(["sleep", "600"])
        print("running", flush=True)
        time.sleep(600)
    """)
    log = tmp_path / "log"

    def interrupt() -> None:
        with planning(Path("some-model"), {}, log) as plan:
            deadline = time.monotonic() + 60
            while "running" not in log.read_text() and time.monotonic() < deadline:
                plan.check()
                time.sleep(0.1)
            assert len(started.left()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not started.left_after(5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_process_starts_ends_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals, started: Started
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
    assert not started.left_after(5)


def test_an_engine_that_writes_over_its_environment_and_outlives_its_server_is_found(
    started: Started,
) -> None:
    titled = "import setproctitle, time; setproctitle.setproctitle('VLLM::EngineCore' + ' ' * 9000)"
    engine = [sys.executable, "-c", f"{titled}; time.sleep(600)"]
    server = f"import subprocess; subprocess.Popen({engine!r})"
    subprocess.run([sys.executable, "-c", server], start_new_session=True, check=True)
    deadline = time.monotonic() + 60
    while not any(map(is_titled, started.left())) and time.monotonic() < deadline:
        time.sleep(0.1)
    (engine_left,) = started.processes()
    assert is_titled(engine_left.cmdline()[0])
    started.kill_all()
    assert not started.left_after(5)


def test_a_process_that_ran_before_a_test_is_not_one_of_its_own(started: Started) -> None:
    sleep = ["sh", "-c", "sleep 600 & wait"]
    with subprocess.Popen(sleep) as other:
        deadline = time.monotonic() + 60
        # The shell's child has the shell's name until it becomes `sleep`.
        while "sleep 600" not in started.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        later = Started()
        assert not later.left()
        (child,) = psutil.Process(other.pid).children()
        other.kill()
        other.wait()
        assert child.ppid() == os.getpid()
        assert not later.left()
        assert started.left() == ["sleep 600"]


def test_the_table_shows_each_cache_in_its_own_row(capsys: pytest.CaptureFixture[str]) -> None:
    demo_main._show_capacity(k8v4=Capacity(2612, 128, 20), bf16=Capacity(1000, 64, 15))
    output = capsys.readouterr().out
    assert re.search(r"bf16\W+1,000\W+64\W+15\b", output)
    assert re.search(r"k8v4\W+2,612\W+128\W+20\b", output)
    assert "In requests of max_model_len k8v4 holds 2.61 times the tokens of bf16." in output


def test_an_empty_answer_is_an_error() -> None:
    with pytest.raises(ProcessError, match="chat, again: the server answered without any text"):
        demo_main._print_answer("chat, again", "a question", "", None)


@pytest.mark.parametrize(("hits", "error"), [(0, "were not found"), (640, None)])
def test_prompts_that_miss_the_prefix_cache_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    hits: int,
    error: str | None,
) -> None:
    name = "vllm:prefix_cache"
    metrics = f'{name}_queries_total{{engine="0"}} 1280.0\n{name}_hits_total{{engine="0"}} {hits}.0'
    monkeypatch.setattr(demo_main, "_metrics", lambda server: metrics)
    if error is None:
        demo_main._show_prefix_cache(None)
    else:
        with pytest.raises(ProcessError, match=error):
            demo_main._show_prefix_cache(None)
    said = f"Prefix cache: 1280 tokens asked for, {hits} found ({hits / 1280:.0%})."
    assert said in capsys.readouterr().out


@pytest.mark.engine
def test_the_demo_serves_answers_measures_and_leaves_no_process(started: Started) -> None:
    done = subprocess.run(
        DEMO, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    output = done.stdout
    assert done.returncode == 0, output + done.stderr
    assert "--kv-cache-dtype turboquant_k8v4" in output
    assert re.search(r"Plugin: hybrid_kv \S+ active on vLLM \S+ \(cpu\): .*kernels=cpu:", output)

    # An answer may be wrapped, and ends where the next thing begins.
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
    # 196 bytes a token and head against 512, and 128 tokens a block for both.
    assert tokens["k8v4"] / tokens["bf16"] == pytest.approx(512 / 196, rel=0.01)
    assert blocks["k8v4"] / blocks["bf16"] == pytest.approx(512 / 196, rel=0.01)

    counted = re.search(r"Prefix cache: (\d+) tokens asked for, (\d+) found", output)
    assert counted is not None, output
    asked, found = map(int, counted.groups())
    assert asked > found >= 2 * 256

    assert "no process is left" in output
    assert not started.left()


@pytest.mark.engine
@pytest.mark.parametrize(
    ("stage", "number"), [("importing vLLM", signal.SIGINT), ("Ready", signal.SIGTERM)]
)
def test_an_interrupted_demo_ends_the_server_and_the_plan(
    stage: str, number: signal.Signals, started: Started
) -> None:
    demo = subprocess.Popen(
        DEMO, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if stage in line:
                break
        running = started.left()
        assert any("vllm serve" in command for command in running), running
        if stage == "importing vLLM":
            assert any("demo.capacity" in command for command in running), running
        demo.send_signal(number)
        rest = demo.communicate(timeout=60)[0]
        assert demo.returncode == 130, rest
        assert "Interrupted" in rest
        assert "Traceback" not in rest
        assert not started.left_after(10)
    finally:
        demo.kill()


@pytest.mark.engine
def test_a_demo_whose_server_fails_shows_its_log_and_fails(started: Started) -> None:
    # The plan is told that it can be made, so that the server is what fails.
    code = "from demo import capacity; "
    code += "capacity.PLAN_ENVIRONMENT['VLLM_HYBRID_KV_COORDINATOR'] = 'stock'; "
    done = run_changed(code, VLLM_HYBRID_KV_COORDINATOR="no such thing")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "end of server.log" in done.stdout
    assert "no such strategy" in done.stdout
    assert "The demo failed: vllm serve ended" in done.stdout
    assert not started.left()


@pytest.mark.engine
def test_a_demo_whose_plan_fails_shows_its_log_and_fails(started: Started) -> None:
    done = run_changed(
        "from demo import __main__ as main; main.BF16_ENGINE['max_model_len'] = -5; "
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "end of bf16-plan.log" in done.stdout
    assert "max_model_len" in done.stdout
    assert done.stdout.count("The demo failed: vLLM did not plan a cache for") == 1
    assert "Done in" not in done.stdout
    assert "Traceback" not in done.stderr
    assert not started.left()


def run_changed(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the demo after some code that changes it."""
    code += "from demo.__main__ import main; raise SystemExit(main())"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
