"""A call on a part of a larger one: how its masks, score modifiers and dropout are asked.

Several devices share one call to attention: each has some of its sequences, heads, queries or keys. Masks and
modifiers are those of the whole call, with tensors of its sizes, so that a part counts the same pairs, with
the same scores, as one device would. Their functions are asked with indices of the whole:

    whole = part + (first_batch, first_head, first_row, first_key)        batch: part mod period + first_batch

and the keys that an interval names are brought back to the part: `moved` makes one such function for each
that it is given (asking.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton.language as tl  # noqa: F401 - the interpreter wants it beside a jit function

from .asking import asking
from .masks.mask import BoundMask
from .scores.score import BoundScore, Parameter
from .shape import Shape


class Place(NamedTuple):
    """The sizes of the whole call, and where the part begins in it."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    first_batch: int = 0
    first_head: int = 0  # of the query heads
    first_row: int = 0
    first_key: int = 0
    period: int = 0  # after so many of the part's sequences the same come again, as under vmap; 0: none does

    @property
    def origin(self) -> tuple[int, int, int, int]:
        return self[5:9]

    @property
    def asked(self) -> tuple[int, int, int, int, int]:
        """What device functions are told: the origin, and the period, or more sequences than there are."""
        return *self.origin, self.period or self.batch

    def whole(self, part: Shape) -> Shape:
        """The shape of the whole call that a call of this shape is a part of. Of a cache it has the lengths
        where the whole has them; those of others, which nobody asks for, are 0."""
        packing, cache = part.packing, part.cache
        if cache is not None and part.batch != self.batch:
            behind = self.batch - self.first_batch - part.batch
            lens = torch.nn.functional.pad(cache.kv_lens, (self.first_batch, behind))
            cache = cache._replace(kv_lens=lens)
        return Shape(*self[:5], part.head_dim, part.value_dim, packing, cache)


# ---- Device functions. TARGET is the function that is asked; args: the origin, and what it takes itself.

TARGET: Any = None


def ask_interval(q_idx, batch, head, args):
    origin = args[0]
    lo, hi, whole = TARGET(q_idx + origin[2], batch % origin[4] + origin[0], head + origin[1], args[1])
    return lo - origin[3], hi - origin[3], whole


def ask_keep(q_idx, kv_idx, batch, head, args):
    origin = args[0]
    return TARGET(
        q_idx + origin[2], kv_idx + origin[3], batch % origin[4] + origin[0], head + origin[1], args[1]
    )


def ask_coverage(q_idx, kv_first, kv_last, batch, head, args):
    origin = args[0]
    first, last = kv_first + origin[3], kv_last + origin[3]
    return TARGET(q_idx + origin[2], first, last, batch % origin[4] + origin[0], head + origin[1], args[1])


def ask_score(s, batch, head, q_idx, kv_idx, args):
    origin = args[0]
    return TARGET(
        s, batch % origin[4] + origin[0], head + origin[1], q_idx + origin[2], kv_idx + origin[3], args[1]
    )


def ask_read(batch, head, q_idx, kv_idx, args):
    origin = args[0]
    return TARGET(
        batch % origin[4] + origin[0], head + origin[1], q_idx + origin[2], kv_idx + origin[3], args[1]
    )


def moved(ask: Callable[..., Any], target: Any) -> Any:
    """`ask` as a device function that asks `target`; None for none."""
    return None if target is None else asking(ask, TARGET=target)


# ---- The host's side


def place_mask(mask: BoundMask, place: Place) -> BoundMask:
    """A mask of the whole call, bound to that, as one of the part."""
    args = place.asked, mask.args
    coverage = moved(ask_coverage, mask.coverage)
    return BoundMask(moved(ask_interval, mask.interval), moved(ask_keep, mask.keep), args, coverage)


def place_score(score: BoundScore, place: Place) -> BoundScore:
    args = place.asked, score.args
    return BoundScore(moved(ask_score, score.score), args, moved(ask_score, score.derivative))


def place_parameter(parameter: Parameter, place: Place, part: Shape) -> Parameter:
    """The parameter as the part reads it: the elements of its own sequences, heads, rows and keys."""
    derivative, sizes, buckets, shift_args = parameter
    dense = part.packing is None  # rows of packed sequences are counted inside each
    own = (part.batch, part.q_heads, part.q_len if dense else None, part.kv_len if dense else None)
    sizes = tuple([n if n == 1 or mine is None else mine for n, mine in zip(sizes, own, strict=False)])
    if len(shift_args) < 3:  # kv - q of the whole is that of the part, and what the part is off the diagonal
        off = place.first_row - place.first_key
        shift_args = (own_sequences(shift_args, place, part) + off, *shift_args[1:])
    return Parameter(moved(ask_score, derivative), sizes, buckets, shift_args)


def own_sequences(shift_args: tuple[Any, ...], place: Place, part: Shape) -> Any:
    """The shift of all sequences, or those of the part's."""
    shift = shift_args[0]
    if len(shift_args) == 1 or shift.numel() == 1:
        return shift
    return shift[place.first_batch : place.first_batch + part.batch]


def own_part(x: torch.Tensor, parameter: Parameter, place: Place, part: Shape) -> torch.Tensor:
    """What the part reads of a parameter's tensor, or of its gradient: a view; `parameter` as the whole call
    has it."""
    if parameter.buckets is not None:  # a table, a row a query head
        return x[place.first_head : place.first_head + part.q_heads]
    view, own = x.view(parameter.sizes), place_parameter(parameter, place, part).sizes
    for axis, (first, size) in enumerate(zip(place.origin, own, strict=True)):
        if view.shape[axis] != size:
            view = view.narrow(axis, first, size)
    return view
