"""A few steps of a tiny model through the real kernels, forward and backward, on a machine without a GPU.

    TRITON_INTERPRET=1 python -m train_gpt.interpreted < request.json

Triton decides when it is imported whether kernels are interpreted, hence a process of its own. It reads the
name of a text and settings, and writes the losses, both as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from .compare import Comparison, compare
from .settings import ExampleError, Settings
from .text import Corpus, load_corpus
from .training import Run

EXAMPLES = Path(__file__).resolve().parents[1]


def tiny(settings: Settings, steps: int) -> Settings:
    """Sizes that the interpreter gets through in seconds; a context that is no multiple of a tile."""
    return replace(
        settings, implementation="tilewise", device="cpu", dtype="fp32", steps=steps, batch=2,
        context=min(40, settings.context), width=32, layers=1, heads=2, dropout=0.0,
    )  # fmt: skip


def losses_of(variant: str, settings: Settings, corpus: Corpus, impl: str | None = None) -> list[float]:
    run = Run(variant, settings, len(corpus.vocabulary), impl)
    for _ in range(settings.steps):
        run.step(corpus)
    return run.losses


def compare_with_interpreter(
    text: Path, settings: Settings, steps: int, stopped: Callable[[], bool]
) -> Comparison | None:
    """The interpreted kernels' losses against plain PyTorch's; None if `stopped` before the end.

    Raises ExampleError with what the child process had to say where it failed.
    """
    settings = tiny(settings, steps)
    corpus = load_corpus(text, settings.context)
    interpreted = run_child(text, settings, stopped)
    if interpreted is None:
        return None
    plain = losses_of("tilewise", settings, corpus, impl="torch")
    return compare(interpreted, plain, losses_of("control", settings, corpus), settings.dtype)


def run_child(text: Path, settings: Settings, stopped: Callable[[], bool]) -> list[float] | None:
    path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, "-m", "train_gpt.interpreted"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is for this process to act on
    )
    request: str | None = json.dumps({"text": str(text), "settings": asdict(settings)})
    try:
        while True:
            try:
                output, errors = child.communicate(request, timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                request = None  # it has been sent
                if stopped():
                    return None
    finally:
        child.kill()
        child.wait()
    if child.returncode:
        last = errors.strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise ExampleError(f"training in Triton's interpreter failed: {last[0]}")
    return json.loads(output)


def main() -> None:
    request = json.load(sys.stdin)
    settings = Settings(**request["settings"])
    corpus = load_corpus(Path(request["text"]), settings.context)
    json.dump(losses_of("tilewise", settings, corpus, impl="portable"), sys.stdout)


if __name__ == "__main__":
    main()
