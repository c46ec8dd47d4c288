# SPDX-License-Identifier: Apache-2.0
"""Fuzz what reads bytes, guided by the code that they reach: needs the extra `fuzz` (atheris).

    python -m tests.fuzz.coverage_guided [--seconds 60] [--only trace] [--out FILE]

Each parser runs in a process of its own, from documents that are right. Whatever it raises beside
its own error is a finding: its input is written to `.cache/fuzz` and the command ends with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / ".cache" / "fuzz"

# Short ones: a change of a byte is then often one that matters.
MODEL = b'{"architectures": ["LlamaForCausalLM"], "model_type": "llama"'
SEEDS = {
    "trace": [
        b'{"timestamp": 27000, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}\n'
    ],
    "config": [
        MODEL + b', "num_hidden_layers": 32}',
        MODEL + b', "quantization_config": {"quant_method": "modelopt", "quantization": {}}}',
        MODEL + b', "text_config": {"architectures": ["Gemma3ForCausalLM"], "model_type": "a"}}',
    ],
    "settings": [b'{"unify_page_sizes": "lcm", "debug": true, "cpu_isa": "auto"}'],
    "sizes": [b"1.5 GiB"],
}
VALUES = (None, True, 0, -1, 1e300, "", "fp8", [], {}, [[]], ["x"], {"quant_method": 1})
"""What a field is replaced by."""


@dataclass(frozen=True)
class Fuzzed:
    """What came of one parser.

    Attributes:
        parser: Its name.
        executions: Inputs that it was given.
        covered: Edges of our code that they reached.
        seconds: For how long.
        finding: What it raised that it should not have; "" for nothing.
    """

    parser: str
    executions: int
    covered: int
    seconds: int
    finding: str


def trace(folder: Path) -> Callable[[bytes], None]:
    """Read a trace, and make its tokens."""
    from vllm_hybrid_kv.tools.replay.trace import Conversations, TraceError, read_trace

    path = folder / "trace.jsonl"

    def parse(content: bytes) -> None:
        path.write_bytes(content)
        try:
            requests = read_trace(path)
        except TraceError:
            return
        # What is longer than any model takes is refused before its tokens are made.
        if max(request.output_length for request in requests) < 1 << 16:
            Conversations(requests).tokens(0)

    return parse


def config(folder: Path) -> Callable[[bytes], None]:
    """Read a model's config.json and make it ready to be planned."""
    from vllm_hybrid_kv.tools.plan.model_description import DescriptionError, described

    path = folder / "config.json"

    def parse(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(DescriptionError), described(path):
            pass

    return parse


def settings(folder: Path) -> Callable[[bytes], None]:
    """Resolve a section of `--additional-config`, and the same text in a variable."""
    from vllm_hybrid_kv.errors import HybridKVSettingsError
    from vllm_hybrid_kv.settings import Settings, environment_name, resolve

    fields = tuple(Settings.model_fields)

    def parse(content: bytes) -> None:
        try:
            section = json.loads(content)
        except (ValueError, RecursionError):
            section = {}
        text = content.decode("utf-8", "replace")
        for given, variables in (
            (section, {}),
            ({}, {environment_name(fields[len(content) % len(fields)]): text}),
        ):
            with contextlib.suppress(HybridKVSettingsError):
                resolve({"hybrid_kv": given}, variables)

    return parse


def sizes(folder: Path) -> Callable[[bytes], None]:
    """Read a size of memory as users write it."""
    from vllm_hybrid_kv.tools.options import memory_size
    from vllm_hybrid_kv.tools.output import format_size

    def parse(content: bytes) -> None:
        try:
            size = memory_size(content.decode("utf-8", "replace"))
        except ValueError:
            return
        format_size(size)

    return parse


PARSERS = {"trace": trace, "config": config, "settings": settings, "sizes": sizes}


def json_of(content: bytes) -> Any:
    """Return the JSON that this is, or None."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def with_a_change(document: Any, draw: random.Random) -> Any:
    """Return JSON of which one place is another value."""
    if isinstance(document, dict) and document and draw.random() < 0.8:
        name = draw.choice(sorted(document))
        return {**document, name: with_a_change(document[name], draw)}
    if isinstance(document, list) and document and draw.random() < 0.5:
        place = draw.randrange(len(document))
        return [*document[:place], with_a_change(document[place], draw), *document[place + 1 :]]
    return draw.choice(VALUES)


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one parser in this process, which ends with it."""
    import atheris

    folder = Path(tempfile.mkdtemp())
    (folder / "seeds").mkdir()
    for number, seed in enumerate(SEEDS[name]):
        (folder / "seeds" / str(number)).write_bytes(seed)
    if name == "config":
        # Not instrumented: coverage of vLLM would drown ours.
        import vllm.model_executor.models  # noqa: F401

    def mutate(content: bytes, longest: int, seed: int) -> bytes:
        # A fuzzer that knows bytes only seldom gets from one JSON to another.
        draw = random.Random(seed)
        if draw.random() < 0.5 and (document := json_of(content)) is not None:
            return json.dumps(with_a_change(document, draw)).encode()[:longest]
        return bytes(atheris.Mutate(content, longest))

    with atheris.instrument_imports(include=["vllm_hybrid_kv", "json"]):
        parse = PARSERS[name](folder)
    options = [
        *(f"-max_total_time={seconds}", "-print_final_stats=1", "-timeout=60", "-verbosity=1"),
        *("-max_len=2048", f"-artifact_prefix={FOUND}/{name}-", str(folder / "seeds")),
    ]
    atheris.Setup([sys.argv[0], *options], parse, custom_mutator=mutate)
    atheris.Fuzz()


def run(name: str, seconds: int) -> Fuzzed:
    """Fuzz one parser in a process of its own.

    Raises:
        RuntimeError: It did not come to an end that says anything.
    """
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz.coverage_guided"),
            *("--in-process", name, "--seconds", str(seconds)),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    executions = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stdout)
    covered = re.findall(r"cov: (\d+)", done.stdout)
    finding = ""
    if done.returncode:
        raised = re.search(r"Uncaught Python exception: ===\n(.*)", done.stdout)
        finding = raised[1] if raised else done.stdout[-2000:]
    elif not executions:
        raise RuntimeError(f"{name}: {done.stdout[-2000:]}")
    return Fuzzed(name, int((executions or [0])[-1]), int((covered or [0])[-1]), seconds, finding)


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.coverage_guided")
    parser.add_argument("--seconds", type=int, default=60, help="for each parser")
    parser.add_argument("--only", choices=PARSERS, action="append", help="may be repeated")
    parser.add_argument("--out", type=Path, help="a file for the outcome, as JSON")
    parser.add_argument("--in-process", choices=PARSERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        fuzz(options.in_process, options.seconds)
    FOUND.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in options.only or PARSERS:
        outcome = run(name, options.seconds)
        outcomes.append(outcome)
        print(
            f"{name}: {outcome.executions:,} inputs in {outcome.seconds} s, "
            f"{outcome.covered:,} edges, {outcome.finding or 'nothing found'}",
            flush=True,
        )
    if options.out is not None:
        options.out.write_text(
            json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n"
        )
    return int(any(outcome.finding for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
