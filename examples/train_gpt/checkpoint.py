"""Files that are whole or not there: checkpoints, and the results beside them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .parts import check_folder, load_parts, remove_parts
from .ranks import ALONE, Ranks
from .settings import ExampleError, Settings
from .training import Run

CHECKPOINT = "checkpoint.pt"
FORMAT = "tilewise train_gpt 1"


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new file, then put it in place of `path` in one go; until then `path` is as it was.

    Raises ExampleError where that cannot be done.
    """
    # Beside `path`, so that moving is a rename within one file system. It ends as `path` does, because
    # matplotlib goes by that.
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        try:
            write(unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where a disk is full
        raise ExampleError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def save_checkpoint(
    out: Path, settings: Settings, digest: str, runs: dict[str, Run], ranks: Ranks = ALONE
) -> None:
    """Everything that it takes to go on: the batch of a step follows from seed and step, as does dropout.

    Runs in parts come first, each in a new folder. Then the one file that names them takes the place of the
    last, and what only the last has named is removed: at any moment, the file and what it names are whole.
    """
    states = {variant: run.save(out) for variant, run in runs.items()}

    def write() -> None:
        content = {"format": FORMAT, "settings": asdict(settings), "text": digest, "runs": states}
        if ranks.first:
            replace_file(out / CHECKPOINT, lambda path: torch.save(content, path))
            remove_parts(out, {state.get("parts") for state in states.values()})

    ranks.together(write)


def load_checkpoint(out: Path) -> dict[str, Any] | None:
    """The content of a checkpoint, its settings as Settings; None if there is none.

    Raises ExampleError for a file that is not a checkpoint of this program.
    """
    path = out / CHECKPOINT
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        for state in content["runs"].values():
            if "parts" in state:
                check_folder(out / state["parts"])
        return content | {"settings": Settings(**content["settings"])}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ExampleError(f"cannot read {path}: {error.strerror}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise ExampleError(f"{path} is not a checkpoint of this program: start over with --fresh") from error


def load_weights(out: Path, content: dict[str, Any], variant: str, model: nn.Module) -> None:
    """Give a model the weights that the checkpoint in `out` has of a variant."""
    state = content["runs"][variant]
    if "parts" in state:
        load_parts(out / state["parts"], model)
    else:
        model.load_state_dict(state["model"])


def steps_done(content: dict[str, Any]) -> int:
    """How many steps a checkpoint's models have been trained for."""
    return len(content["runs"][content["settings"].variants[0]]["losses"])


def restore(out: Path, runs: dict[str, Run], content: dict[str, Any]) -> None:
    """Put every run where the checkpoint has it. Raises ExampleError where it does not fit."""
    try:
        for variant, run in runs.items():
            run.load(content["runs"][variant], out)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ExampleError(
            f"the checkpoint does not fit the model it names: start over with --fresh ({error})"
        ) from error
