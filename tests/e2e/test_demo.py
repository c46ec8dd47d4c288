# SPDX-License-Identifier: Apache-2.0
"""`python -m demo` serves a hybrid model over HTTP, and no process outlives it."""

from __future__ import annotations

import ctypes
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import demo.__main__ as demo_main
from testing.models import large_state_config
from testing.processes import ProcessError, run, wait_until

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 500.0
"""Time limit for the demo. The demo waits less long for its server, so it ends by itself."""
DEMO = [sys.executable, "-m", "demo"]

Commands = Callable[[], list[str]]


def adopt_orphans(wanted: bool) -> None:
    """Let this process become the parent of orphaned descendants, or stop doing so."""
    pr_set_child_subreaper = 36
    assert ctypes.CDLL(None).prctl(pr_set_child_subreaper, wanted, 0, 0, 0) == 0


@pytest.fixture
def descendants() -> Iterator[Commands]:
    """A function that returns the command lines of all processes that the test started.

    It finds processes by parent, because vLLM's engines overwrite their environment variables.
    """
    before = set(psutil.Process().children(recursive=True))

    def processes() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)) - before

    def commands() -> list[str]:
        found = []
        for process in processes():
            with suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
        return found

    # Reset SIGINT: if a shell runs the tests in the background, their children ignore Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    adopt_orphans(True)
    yield commands
    for process in processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    adopt_orphans(False)
    signal.signal(signal.SIGINT, handler)


def test_an_empty_answer_is_an_error() -> None:
    with pytest.raises(ProcessError, match="chat, again: the server answered without any text"):
        demo_main._print_answer("chat, again", "a question", "", None)


def test_prompts_that_miss_the_prefix_cache_are_an_error() -> None:
    with pytest.raises(ProcessError, match="did not hit"):
        demo_main._show_prefix_cache(queries=1280, hits=0)


def test_a_failing_plan_is_an_error_with_its_log(tmp_path: Path) -> None:
    large_state_config().save_pretrained(tmp_path)
    arguments = (*demo_main.PLAN_ARGUMENTS, "--max-model-len", "-5")
    with (
        demo_main.planning(tmp_path, tmp_path, arguments) as plan,
        pytest.raises(ProcessError, match="vllm-hybrid-kv plan failed") as caught,
    ):
        plan()
    assert "--max-model-len: Input" in caught.value.log.read_text()


@pytest.mark.engine
def test_the_demo_serves_requests_and_leaves_no_process(descendants: Commands) -> None:
    done = run(DEMO, cwd=ROOT, timeout_s=TIMEOUT_S)
    output = done.stdout
    assert done.returncode == 0, output + done.stderr
    assert "--kv-cache-dtype turboquant_k8v4" in output
    assert re.search(r"Plugin: hybrid_kv \S+ active on vLLM \S+ \(cpu\): .*kernels=cpu:", output)

    # An answer may have several lines; it ends where the next section begins.
    answers = re.findall(
        r"^(chat|completion), (?:first time|again): .*\n  > .*\n  ([^:]+)\n(?=chat,|comp\w+,|KV)",
        output,
        re.M,
    )
    assert [kind for kind, _ in answers] == ["chat", "chat", "completion", "completion"]
    # The second answers use pages of the prefix cache.
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]
    assert len(answers[0][1].split()) > 5

    rows = dict(re.findall(r"(bf16|k8v4)\W+([\d,]+\W+128\W+[\d,]+)", output))
    counts = {cache: re.findall(r"[\d,]+", row) for cache, row in rows.items()}
    for bf16, k8v4 in zip(counts["bf16"][::2], counts["k8v4"][::2], strict=True):
        # One token of one head takes 196 bytes instead of 512; blocks have 128 tokens.
        times = int(k8v4.replace(",", "")) / int(bf16.replace(",", ""))
        assert times == pytest.approx(512 / 196, rel=0.01)
    assert re.search(r"k8v4 holds 2\.6\d times the tokens of bf16", output)

    ((hits, queries),) = re.findall(r"Prefix cache: (\d+) of (\d+) prompt tokens were hits", output)
    assert int(queries) > int(hits) >= 2 * 256

    assert "no process is left" in output
    assert not descendants()


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_ends_the_server_and_the_plan(
    number: signal.Signals, descendants: Commands
) -> None:
    demo = subprocess.Popen(
        DEMO, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert demo.stdout is not None
        next(line for line in demo.stdout if "importing vLLM" in line)
        running = "\n".join(descendants())
        assert "vllm serve" in running
        assert "vllm-hybrid-kv plan" in running
        demo.send_signal(number)
        rest = demo.communicate(timeout=60)[0]
        assert demo.returncode == 130, rest
        assert "Interrupted" in rest
        assert "Traceback" not in rest
        assert wait_until(lambda: not descendants(), 10)
    finally:
        demo.kill()


@pytest.mark.engine
def test_a_failing_server_shows_its_log_and_fails_the_demo(descendants: Commands) -> None:
    code = "main.SERVE_ARGUMENTS += ('--max-num-seqs', '0'); raise SystemExit(main.main())"
    command = [sys.executable, "-c", f"import demo.__main__ as main; {code}"]
    done = run(command, cwd=ROOT, timeout_s=TIMEOUT_S)
    assert done.returncode == 1, done.stdout + done.stderr
    for part in ("end of server.log", "max_num_seqs", "The demo failed: vllm serve ended"):
        assert part in done.stdout
    assert "Done in" not in done.stdout
    assert "Traceback" not in done.stderr
    assert not descendants()
