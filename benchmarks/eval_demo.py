# SPDX-License-Identifier: Apache-2.0
"""What do k8v4 pages change about predictions, and what do boundary layers have to do with it?

    python -m benchmarks.eval_demo [--model FOLDER] [--out DIR] [--windows N]

Runs `vllm-hybrid-kv eval` with the unquantised cache, fp8, and k8v4 with 0, 1 and 2 layers at each
end left unquantised. The model is the one of `tests/recall` that has been trained to recall, and
the data is what it has not seen: text of Python's documentation, and pairs of symbols to recall.
Where there is no trained model one with random weights takes its place, and random tokens.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testing.machine import host

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ROOT / "tests" / "recall" / "models" / "gemma3"
K8V4 = "turboquant_k8v4"
CACHES = ("fp8", *(f"{K8V4}[boundary_layers={number}]" for number in (0, 1, 2)))
WINDOW = 1024
SEED = 6
NAME = "eval_demo"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{NAME}",
        description="What do k8v4 pages change about predictions?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, default=TRAINED, help="a trained model of tests/recall")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="for the results")
    add("--windows", type=int, default=10, help="sequences of each kind")
    add("--work", type=Path, default=ROOT / ".cache" / NAME, help="where a run goes on")
    return parser.parse_args(arguments)


def trained_data(count: int) -> tuple[str, list[list[int]]]:
    """Return what a model of `tests/recall` has not seen, and what it is."""
    import numpy

    recall: Any = importlib.import_module("tests.recall.sequences")
    draw = numpy.random.default_rng(SEED)
    text = recall.held_out()
    starts = draw.integers(0, len(text) - WINDOW, count)
    texts = [[recall.BOS, *text[at : at + WINDOW - 1].tolist()] for at in starts]
    pairs = [recall.recall_sequence(draw, WINDOW).tokens.tolist() for _ in range(count)]
    what = (
        f"{count} windows of text from Python's documentation that it was not trained on, and "
        f"{count} of pairs to recall between text, {WINDOW:,} tokens each"
    )
    return what, [*texts, *pairs]


def random_data(folder: Path, count: int) -> tuple[str, list[list[int]]]:
    """Make a model with random weights, once; return random tokens, and what they are."""
    import random

    from testing.models import CONFIGS, build_model
    from testing.tokenizer import VOCAB_SIZE

    if not (folder / "config.json").exists():
        build_model(CONFIGS["gemma3"](), folder)
    drawn = random.Random(SEED)
    tokens = [[drawn.randrange(VOCAB_SIZE) for _ in range(WINDOW)] for _ in range(count)]
    return f"{count} windows of {WINDOW:,} random tokens", tokens


def evaluate(model: Path, data: Path, out: Path, work: Path) -> str:
    """Run the command and return what it printed."""
    command = [
        *(str(Path(sys.executable).with_name("vllm-hybrid-kv")), "eval", str(model)),
        *("--data", str(data), "--kv-cache-dtype", ",".join(CACHES), "--context", str(WINDOW)),
        *("--work", str(work)),
        *("--json", str(out / f"{NAME}.json"), "--plot", str(out / f"{NAME}.png")),
    ]
    environment = {**os.environ, "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    # The progress goes to the screen.
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def markdown(what: str, model: str, printed: str, machine: dict[str, Any]) -> str:
    """Return the report."""
    return f"""# What k8v4 pages change about predictions

`make eval-demo`, which is `python -m benchmarks.{NAME}`. {model}

Data: {what}.

Machine: {machine["cpu"]}, {machine["cpus"]} CPUs; Python {machine["python"]}, vLLM \
{machine["vllm"]}.

```
{printed.strip()}
```

![KL divergence by position, and its tail]({NAME}.png)
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if options.model.is_dir():
            model, work = options.model, options.work / "trained"
            what, sequences = trained_data(options.windows)
            about = f"The model is that of `{_from_root(model)}`, trained on recall and text."
        else:
            # Kept, for a run goes on only with the same files.
            model, work = options.work / "model", options.work / "random"
            what, sequences = random_data(model, options.windows)
            about = (
                "**The model has random weights** (gemma3 of `testing/models.py`): no trained "
                "one was found. Compare the caches with each other, not with auto."
            )
        data = Path(scratch) / "data.jsonl"
        lines = (json.dumps({"prompt_token_ids": tokens}) for tokens in sequences)
        data.write_text("".join(f"{line}\n" for line in lines))
        printed = evaluate(_from_root(model), data, options.out, work)
    printed = "\n".join(line.rstrip() for line in printed.splitlines())
    print(printed)
    (options.out / f"{NAME}.md").write_text(markdown(what, about, printed, host()))


def _from_root(path: Path) -> Path:
    """Return a path as it is seen from the repository's root, where commands run."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main()
