"""Which exercises are there, whose file holds the answer, and what is said about it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import checks, kernel_checks
from .verdict import Refused, Unsolved

FOLDERS = (Path("examples/ladder"), Path("."))  # where a rung's file is looked for


@dataclass(frozen=True)
class Exercise:
    number: int
    rung: str  # the file's name without .py
    asks: str
    check: Callable[[Callable[..., Any]], str]


EXERCISES = {
    each.number: each
    for each in (
        Exercise(1, "01_naive", "a mask, with rows that see no key", checks.check_mask),
        Exercise(2, "02_three_kernels", "a softmax in place", kernel_checks.check_softmax),
        Exercise(3, "03_online_softmax", "lse in one pass", checks.check_lse),
        Exercise(
            4, "04_fused_loop", "cross-attention and lse in one loop", kernel_checks.check_cross_attention
        ),
        Exercise(5, "05_masks_as_ranges", "the ranges of a prefix mask", checks.check_ranges),
        Exercise(6, "06_base_two", "a scale of any sign", kernel_checks.check_scale),
        Exercise(7, "07_backward", "delta where lse has a gradient", checks.check_delta),
        Exercise(8, "08_split_keys", "the merge of two results", checks.check_merge),
        Exercise(9, "09_warp_roles", "a ring with two consumers", kernel_checks.check_ring),
    )
}


class NotFound(Exception):
    """There is nothing to check; the text says what is missing."""


def file_of(number: int) -> Path:
    """The rung's own file, in one of FOLDERS.

    Raises:
        NotFound: it is in neither.
    """
    name = f"{EXERCISES[number].rung}.py"
    for folder in FOLDERS:
        if (folder / name).is_file():
            return folder / name
    raise NotFound(
        f"{name} is neither in ./examples/ladder nor here: name the file that holds your exercise(), "
        f"python -m tilewise.ladder check {number} FILE"
    )


def load(file: Path) -> Callable[..., Any]:
    """The function `exercise` of a file, which may import what lies beside it and beside the rungs.

    Raises:
        NotFound: there is no such file, it cannot be imported, or it has no `exercise`.
    """
    if not file.is_file():
        raise NotFound(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"exercise_in_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise NotFound(f"{file} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    path = [str(file.parent.resolve()), str(FOLDERS[0].resolve())]
    sys.path[:0] = path
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise NotFound(f"{file} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        for each in path:
            sys.path.remove(each)
    exercise = getattr(module, "exercise", None)
    if exercise is None:
        raise NotFound(
            f"{file} has no function `exercise`: the rung's file says what it should take and return"
        )
    return exercise


def check(number: int, exercise: Callable[..., Any]) -> tuple[bool, str]:
    """Whether the answer is right, and what there is to say."""
    asks = EXERCISES[number].asks
    try:
        return True, f"exercise {number}, {asks}: {EXERCISES[number].check(exercise)}"
    except Unsolved:
        return False, (
            f"exercise {number}, {asks}: still to do: exercise() raises NotImplementedError. Its docstring "
            "says what it takes and returns; take your time"
        )
    except Refused as refused:
        return False, f"exercise {number}, {asks}: not yet\n  {refused}"
