"""What `torch.distributed.checkpoint` (DCP) writes of a checkpoint: a model and its optimizer, in parts.

Every rank writes what it has into a folder. Weights and what the optimizer knows of each are stored under
the weight's name and with their place in the whole, so any number of ranks can read them again, one process
without torch.distributed too.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .settings import ExampleError

PREFIX = "parts-"


def make_folder(out: Path) -> str:
    """The name of a new folder for parts, in `out`."""
    try:
        return Path(tempfile.mkdtemp(prefix=PREFIX, dir=out)).name
    except OSError as error:
        raise ExampleError(f"cannot write to {out}: {error.strerror}") from error


def check_folder(folder: Path) -> None:
    """Raise ExampleError unless the folder has been filled, which DCP's list of contents ends."""
    if not (folder / ".metadata").is_file():
        raise ExampleError(
            f"the checkpoint has its weights in {folder}, which is not there, or not whole: bring it back, "
            "or start over with --fresh"
        )


def remove_parts(out: Path, kept: set[str | None]) -> None:
    """Remove all folders of parts but those named."""
    for folder in out.glob(f"{PREFIX}*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """The tensors of both under the names of the weights; of a model in parts, this rank's."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    state: dict[str, Any] = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer)
    return state


def save_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the folder, each rank with its own part. Raises ExampleError, on all, where one cannot."""
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    except dcp.CheckpointException as error:  # on all ranks, whichever failed
        shutil.rmtree(folder, ignore_errors=True)
        raise ExampleError(f"cannot write {folder}: {words_of(error)}") from error


def load_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put model and optimizer where the folder has them. Raises ExampleError where it does not fit them."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict, set_optimizer_state_dict

    state = state_of(model, optimizer)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or")
            dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:
        raise ExampleError(f"cannot read {folder}: {words_of(error)}") from error
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"])


def words_of(error: Any) -> str:
    """What went wrong first, on which rank."""
    rank, (problem, _) = min(error.failures.items())
    return f"rank {rank}: {str(problem).splitlines()[0]}"
