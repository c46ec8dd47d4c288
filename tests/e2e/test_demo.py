# SPDX-License-Identifier: Apache-2.0
"""The main job: `python -m demo` serves a hybrid model over HTTP and shows what came of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300.0
DEMO = [sys.executable, "-m", "demo"]


def servers() -> list[psutil.Process]:
    """Return the processes of vLLM that serve the demo's model, zombies aside."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        info = process.info
        started_by_demo = (info["environ"] or {}).get("HYBRID_KV_TEST_MARK") == str(os.getpid())
        if started_by_demo and info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mark every process that this test starts, however it is started."""
    monkeypatch.setenv("HYBRID_KV_TEST_MARK", str(os.getpid()))


@pytest.mark.usefixtures("marked")
def test_the_demo_serves_answers_measures_and_leaves_no_process() -> None:
    done = subprocess.run(
        DEMO, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    output = done.stdout
    assert done.returncode == 0, output + done.stderr
    assert "--kv-cache-dtype turboquant_k8v4" in output
    assert re.search(r"Plugin: hybrid_kv \S+ active on vLLM \S+ \(cpu\): .*kernels=cpu:", output)

    answers = re.findall(
        r"^(chat|completion), (?:first time|again): .*\n  > .*\n  (.+)$", output, re.M
    )
    assert [kind for kind, _ in answers] == ["chat", "chat", "completion", "completion"]
    # The second time the pages come from the prefix cache.
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]
    assert len(answers[0][1].split()) > 5

    tokens = {}
    for cache in ("bf16", "k8v4"):
        row = re.search(rf"{cache}\s*[│|]\s*([\d,]+) ", output)
        assert row is not None, output
        tokens[cache] = int(row.group(1).replace(",", ""))
    # 196 bytes a token and head against 512, and 128 tokens a block for both.
    assert tokens["k8v4"] / tokens["bf16"] == pytest.approx(512 / 196, rel=0.01)

    counted = re.search(r"Prefix cache: (\d+) tokens asked for, (\d+) found", output)
    assert counted is not None, output
    asked, found = map(int, counted.groups())
    assert asked > found >= 2 * 256

    assert "none of its processes is left" in output
    assert not servers()


@pytest.mark.usefixtures("marked")
@pytest.mark.parametrize("stage", ["importing vLLM", "Ready"])
def test_an_interrupted_demo_ends_the_server(stage: str) -> None:
    demo = subprocess.Popen(
        DEMO, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert demo.stdout is not None
        for line in demo.stdout:
            if stage in line:
                break
        assert len(servers()) > 1
        demo.send_signal(signal.SIGINT)
        rest = demo.communicate(timeout=60)[0]
        assert demo.returncode == 130, rest
        assert "Interrupted" in rest
        deadline = time.monotonic() + 10
        while servers() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not servers()
    finally:
        demo.kill()
        for process in servers():
            process.kill()


@pytest.mark.usefixtures("marked")
def test_a_demo_whose_server_fails_shows_its_log_and_fails() -> None:
    done = subprocess.run(
        DEMO,
        cwd=ROOT,
        env={**os.environ, "VLLM_HYBRID_KV_COORDINATOR": "no such thing"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no such strategy" in done.stdout
    assert "The demo failed" in done.stdout
    assert not servers()
