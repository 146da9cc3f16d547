"""What a check says: the first thing that is wrong, where, what was expected, and when that happens."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tilewise_reference.yardstick import allowed_error, difference, largest_difference


class Refused(Exception):
    """The answer is wrong; the text is what the reader is told."""


class Unsolved(Exception):
    """There is no answer yet: the exercise raises NotImplementedError, and says no more."""


def call(
    case: str, exercise: Callable[..., Any], *args: Any, when: Mapping[type[Exception], str] | None = None
) -> Any:
    """What `exercise` returns. It must leave its arguments as they are.

    when: by the kind of an error, when it happens.
    """
    before = [x.clone() if isinstance(x, Tensor) else x for x in args]
    result = run(case, exercise, *args, when=when)
    for i, (x, y) in enumerate(zip(args, before, strict=True)):
        if isinstance(x, Tensor) and not torch.equal(x.nan_to_num(), y.nan_to_num()):
            raise Refused(f"{case}: argument {i} was changed, and it is not yours to change")
    return result


def run(
    case: str, exercise: Callable[..., Any], *args: Any, when: Mapping[type[Exception], str] | None = None
) -> Any:
    """The same for an exercise that may change its arguments."""
    try:
        return exercise(*args)
    except Exception as error:
        if isinstance(error, NotImplementedError) and not str(error):
            raise Unsolved from error
        hint = next((f": {text}" for kind, text in (when or {}).items() if isinstance(error, kind)), "")
        code = getattr(inspect.unwrap(exercise), "__code__", None)
        where = "" if code is None else place(error, code.co_filename)
        raise Refused(f"{case}: raised {type(error).__name__}{where}: {error}{hint}") from error


def place(error: BaseException, file: str) -> str:
    """The line of the reader's file that an error comes from, which may be the cause of another."""
    frames: list[traceback.FrameSummary] = []
    each: BaseException | None = error
    while each is not None:
        frames += [frame for frame in traceback.extract_tb(each.__traceback__) if frame.filename == file]
        each = each.__cause__
    return f" in {Path(file).name}, line {frames[-1].lineno}" if frames else ""


def compare(
    case: str,
    name: str,
    got: Any,
    want: Tensor,
    torch_error: float,
    dtype: torch.dtype,
    *,
    nan: str = "",
    looks_like: Sequence[tuple[Tensor, str]] = (),
) -> None:
    """`got` must have the dtype and the shape of the float64 `want`, and be no further off than the rule of
    `tilewise_reference.yardstick` allows.

    torch_error: how far PyTorch is off. nan: when NaN happens. looks_like: wrong answers and their reasons.
    """
    if not isinstance(got, Tensor):
        raise Refused(f"{case}: {name} must be a tensor, but is {type(got).__name__}")
    if got.shape != want.shape or got.dtype != dtype:
        raise Refused(
            f"{case}: {name} must be {dtype} of shape {tuple(want.shape)}, but is {got.dtype} of "
            f"{tuple(got.shape)}"
        )
    error = difference(got, want)
    excess = error - allowed_error(want, dtype, torch_error)
    if not bool((excess > 0).any()):
        return
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), want.shape))
    value, expected = got[at].item(), want[at].item()
    hint = nan if value != value else ""
    # The wrong answer that it is much nearer to than to the right one.
    nearest = min(looks_like, key=lambda each: largest_difference(got, each[0]), default=None)
    if nearest is not None and 10 * largest_difference(got, nearest[0]) < largest_difference(got, want):
        hint = nearest[1]
    place = ("row {}" if len(at) == 1 else "row {}, column {}").format(*at)
    raise Refused(
        f"{case}: {name}, {place}: expected {expected:.6g}, got {value:.6g}"
        + (f"; this happens when {hint}" if hint else "")
    )


def pair(case: str, result: Any, names: tuple[str, str]) -> tuple[Any, Any]:
    """A result that must be two things."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise Refused(f"{case}: must return {names[0]} and {names[1]}, but returned {type(result).__name__}")
    return result[0], result[1]
