# SPDX-License-Identifier: Apache-2.0
"""Tools read the messages of child processes, report their errors in one line, and end them."""

import os
import signal
import time

import psutil
import pytest

from testing.processes import wait_until
from vllm_hybrid_kv.tools.child import Child

TARGETS = """
import os, signal, subprocess, sys, time

def finish(send, *arguments):
    print("printed by the child")
    send(arguments=arguments)
    send(path="" in sys.path)

def fail(send): raise ValueError("heads must be\\neven")
def leave(send): raise SystemExit(3)
def exit_at_once(send): os._exit(7)
def crash(send): send(step=1); os.kill(os.getpid(), signal.SIGSEGV)

def hang(send):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    send(grandchild=process.pid)
    time.sleep(600)

def fork(send):
    if os.fork() == 0:
        time.sleep(600)
    send(step=1)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a child with one of the targets."""
    (tmp_path / "targets.py").write_text(TARGETS)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return lambda name, *arguments, timeout=60.0: Child(
        f"targets:{name}",
        *arguments,
        log=tmp_path / "log",
        timeout=timeout,
        environment=environment,
    )


def test_messages_arrive_and_output_goes_to_the_log(start):
    with start("finish", "a", "b c") as child:
        messages = list(child.messages())
    assert messages == [{"arguments": ["a", "b c"]}, {"path": False}]
    assert child.problem is None
    assert child.last_output() == ("printed by the child",)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("fail", "heads must be even"),
        ("leave", "3"),
        ("exit_at_once", "ended with exit status 7"),
        ("missing", "AttributeError: module 'targets' has no attribute 'missing'"),
    ],
)
def test_a_child_that_fails_has_a_problem_in_one_line(start, name, problem):
    with start(name) as child:
        assert list(child.messages()) == []
    assert child.problem == problem


def test_a_crash_names_the_signal_and_the_line(start, tmp_path):
    with start("crash") as child:
        assert list(child.messages()) == [{"step": 1}]
    assert child.problem == f"ended with {signal.SIGSEGV.name} at {tmp_path / 'targets.py'}:12"


def test_the_time_limit_kills_the_child_and_what_it_started(start):
    with start("hang", timeout=3.0) as child:
        (message,) = child.messages()
    assert child.problem == "took more than 3 s"
    grandchild = message["grandchild"]
    assert wait_until(
        lambda: (
            not psutil.pid_exists(grandchild)
            or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE
        ),
        timeout_s=10,
    )


def test_a_forked_process_does_not_keep_the_parent_waiting(start):
    began = time.monotonic()
    with start("fork") as child:
        assert list(child.messages()) == [{"step": 1}]
    assert child.problem is None
    assert time.monotonic() - began < 30
