"""Training all variants side by side, so that an interruption finds them at the same step."""

from __future__ import annotations

import math
import signal
import time
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .checkpoint import save_checkpoint
from .compare import COMPARED
from .ranks import ALONE, Ranks
from .settings import ExampleError, Settings
from .text import Corpus, validation_batches
from .training import Run

SAVE_SECONDS = 10.0  # the most work that a power cut can take
VALIDATIONS = 5


class Stop:
    """Called, says whether Ctrl-C or SIGTERM has asked to stop; a second one ends the program at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def __call__(self) -> bool:
        return self.asked


def train(
    runs: dict[str, Run],
    settings: Settings,
    corpus: Corpus,
    out: Path,
    stop: Stop,
    console: Console,
    ranks: Ranks = ALONE,
) -> bool:
    """Train every variant to its last step, or until `stop` on any rank; in both cases the checkpoint has it
    all. Was it to the last step? All ranks stop at the same one.

    Raises ExampleError where a loss is not a number, or a checkpoint cannot be written.
    """
    batches = validation_batches(corpus, settings)
    shown = [run for variant, run in runs.items() if variant != "control"]
    every = max(1, settings.steps // VALIDATIONS)
    done, saved = len(shown[0].losses), time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=settings.steps, completed=done, losses="")
        while not ranks.any(stop()):
            if done % every == 0 or done == settings.steps:
                for run in shown:
                    if done not in run.validation:
                        run.validate(batches)
            if done == settings.steps:
                break
            for variant, run in runs.items():
                if variant != "control" or done < COMPARED:
                    run.step(corpus)
                    if not math.isfinite(run.losses[-1]):
                        raise ExampleError(f"{variant}: the loss of step {done} is {run.losses[-1]}")
            done += 1
            losses = ", ".join(f"{run.losses[-1]:.3f}" for run in shown)
            progress.update(task, completed=done, losses=f"loss {losses}")
            if ranks.any(time.monotonic() - saved > SAVE_SECONDS):
                save_checkpoint(out, settings, corpus.digest, runs, ranks)
                saved = time.monotonic()
    save_checkpoint(out, settings, corpus.digest, runs, ranks)
    return done == settings.steps
