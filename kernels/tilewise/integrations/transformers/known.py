"""Which mask does a mask function of Transformers mean?

Transformers describes a mask as a function of indices, made by a few factories: `and_masks(f, g)`,
`sliding_window_overlay(size)` and so on. What such a function means cannot be seen from outside, so the
factories are tagged: they return the same function, which also says what it was made of. (Its closure would
tell too, but torch.compile cannot look into one.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers.masking_utils as library

Tensor = torch.Tensor
MaskFunction = Callable[..., Tensor]

TAGGED = (
    "and_masks",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "chunked_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
)


class Tagged:
    """A mask function, and the factory and arguments that it comes from."""

    def __init__(self, function: MaskFunction, factory: str, given: tuple[Any, ...]) -> None:
        self.function, self.factory, self.given = function, factory, given

    def __call__(self, *index: Any) -> Tensor:
        return self.function(*index)


def tag_mask_functions() -> None:
    """Let each factory return what it makes as `Tagged`. A second call changes nothing."""
    for name in TAGGED:
        factory = getattr(library, name, None)  # not all of them are in every version
        if factory is not None and not hasattr(factory, "tilewise_factory"):
            setattr(library, name, tagged(factory))


def tagged(factory: Callable[..., MaskFunction]) -> Callable[..., MaskFunction]:
    name = factory.__name__

    @functools.wraps(factory)
    def make(*given: Any, **named: Any) -> MaskFunction:
        function = factory(*given, **named)
        return function if named else Tagged(function, name, given)

    make.tilewise_factory = factory  # type: ignore[attr-defined]
    return make


class Pattern(NamedTuple):
    """What a mask function was found to say: all of these must hold."""

    causal: bool = False
    windows: tuple[tuple[int | None, int | None], ...] = ()  # keys before and after the row's own position
    chunks: tuple[tuple[int, Tensor], ...] = ()  # a size, and the position [batch] where the first one starts
    documents: tuple[Tensor, ...] = ()  # ids [batch, length], of queries and keys alike
    unknown: tuple[MaskFunction, ...] = ()

    def also(self, other: Pattern) -> Pattern:
        return Pattern(
            self.causal or other.causal, self.windows + other.windows, self.chunks + other.chunks,
            self.documents + other.documents, self.unknown + other.unknown,
        )  # fmt: skip


def pattern_of(function: MaskFunction) -> Pattern:
    """The pattern of a mask function; what is not recognised is in `unknown`."""
    if function is library.causal_mask_function:
        return Pattern(causal=True)
    if function is library.bidirectional_mask_function:
        return Pattern()
    if not isinstance(function, Tagged):
        return Pattern(unknown=(function,))
    given = function.given
    if function.factory == "and_masks":
        return pattern_of_all(given, function)
    if function.factory == "sliding_window_overlay":
        return Pattern(windows=((given[0] - 1, None),))
    if function.factory == "sliding_window_bidirectional_overlay":
        return Pattern(windows=((given[0], given[0]),))
    if function.factory == "chunked_overlay":
        return Pattern(chunks=(tuple(given),))
    if function.factory == "packed_sequence_mask_function":
        return Pattern(documents=(given[0],))
    return Pattern(unknown=(function,))


def pattern_of_all(functions: tuple[MaskFunction, ...], whole: MaskFunction) -> Pattern:
    """The pattern of the functions' intersection.

    Remapped positions count from the start of each packed sequence. Inside one sequence that changes nothing
    for a rule that looks at distances alone, as causal masks and windows do; so a remapped rule is known
    where the sequences are kept apart beside it, and looks at distances.
    """
    found, remapped = Pattern(), Pattern()
    for function in functions:
        if isinstance(function, Tagged) and function.factory == "remap_positions_for_packed_sequence":
            remapped = remapped.also(pattern_of(function.given[0]))
        else:
            found = found.also(pattern_of(function))
    if remapped == Pattern():
        return found
    if not found.documents or remapped.chunks or remapped.documents or remapped.unknown:
        return found.also(Pattern(unknown=(whole,)))
    return found.also(remapped)
