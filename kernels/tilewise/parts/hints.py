"""What did a caller mean by a mask or score that is none? The sentence that an error ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from inspect import Parameter, signature
from typing import Any

import torch

from .shape import Shape, fits

# What masks and scores are called elsewhere, and how they are made here.
MASKS = {
    "causal": "Causal()",
    "top_left": "Causal('top_left')",
    "bottom_right": "Causal()",
    "autoregressive": "Causal()",
    "window": "Window(left, right)",
    "sliding_window": "Window(left, right)",
    "local": "Window(left, right)",
    "padding": "Padding(lengths)",
    "key_padding": "Padding(lengths)",
    "prefix": "Prefix(lengths)",
    "prefix_lm": "Prefix(lengths)",
    "documents": "Documents(ids)",
    "document": "Documents(ids)",
    "packed": "Documents(ids)",
    "intervals": "Intervals(start, end)",
    "block_causal": "BlockCausal(block)",
    "frame_causal": "BlockCausal(tokens_of_a_frame)",
    "neighborhood": "Neighborhood(size, shape=(h, w))",
    "neighbourhood": "Neighborhood(size, shape=(h, w))",
    "natten": "Neighborhood(size, shape=(h, w))",
}
SCORES = {
    "softcap": "Softcap(cap)",
    "tanh": "Softcap(cap)",
    "alibi": "ALiBi(tilewise.alibi_slopes(q_heads))",
    "relative_position": "RelativePosition(table)",
    "relative": "RelativePosition(table)",
    "t5": "RelativePosition(table)",
    "bias": "Bias(bias)",
}
FLASH_LAYOUT = (
    "with transpose(1, 2) of each of q, k and v it would fit: [batch, length, heads, dim] is the layout of "
    "FlashAttention, and here heads come before length"
)
KEEP = "keep(q_idx, kv_idx, batch, head, args)"
SCORE = "score(s, batch, head, q_idx, kv_idx, args)"


def mask_hint(given: Any) -> str:
    """What to give for `mask`, where this is neither one nor what stands for one; "" if nobody knows."""
    if isinstance(given, str):
        return give(given, mask=MASKS, score=SCORES)
    if isinstance(given, bool):
        return "a causal mask is mask=tilewise.Causal(), no mask is mask=None" if given else "leave mask out"
    if isinstance(given, (list, tuple)) and given:
        if len(given) == 2 and all(x is None or type(x) is int for x in given):
            return "a window is mask=tilewise.Window(left, right), with None for no limit"
        if not all(isinstance(x, (bool, int, float, list, tuple)) for x in given):
            return "combine masks with &, | and ~, as in mask=tilewise.Causal() & tilewise.Padding(lengths)"
        return "make a tensor of it: torch.tensor(..., dtype=torch.bool)"
    if isinstance(given, type):
        return instance_of("mask", given)
    if hasattr(given, "__array__"):
        return "make a tensor of it: torch.as_tensor(...)"
    if type(given).__name__ == "BlockMask":
        return (
            "of FlexAttention's BlockMask take the rule: tilewise.Causal(), Window, Prefix, Documents, or "
            f"tilewise.UserMask(keep) of a @triton.jit function {KEEP}"
        )
    if callable(given):
        return function_hint("UserMask(keep", given, 4, "mask_mod", KEEP)
    return f"it is a score: score={given!r}" if argument_for(given) == "score" else ""


def score_hint(given: Any) -> str:
    """The same for `score`."""
    if isinstance(given, str):
        return give(given, score=SCORES, mask=MASKS)
    if isinstance(given, torch.Tensor):
        return "a tensor that is added to scores is bias="
    if isinstance(given, (int, float)):
        return f"a cap is score=tilewise.Softcap({given}), a factor is scale={given}"
    if isinstance(given, type):
        return instance_of("score", given)
    if callable(given):
        return function_hint("UserScore(score", given, 5, "score_mod", SCORE)
    return f"it is a mask: mask={given!r}" if argument_for(given) == "mask" else ""


def argument_for(part: Any) -> str:
    """Whether an object or class is a mask or a score, by what only one of the two answers."""
    return "mask" if hasattr(part, "bounds") else "score" if hasattr(part, "no_gradient") else ""


def give(word: str, **known: Mapping[str, str]) -> str:
    """The call that a word means, or one like it; `known` by argument, the one in question first."""
    for argument, calls in known.items():
        if near := nearest(word, calls):
            return f"give {argument}=tilewise.{calls[near]}"
    return ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of these names that a word is likely to mean; None if none is near."""
    found = difflib.get_close_matches(word.strip().lower().replace(" ", "_").replace("-", "_"), known, 1, 0.7)
    return found[0] if found else None


def instance_of(argument: str, cls: type) -> str:
    """A class was given where an object of it is meant."""
    argument = argument_for(cls) or argument
    of_tilewise = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
    name = f"tilewise.{cls.__name__}" if of_tilewise else cls.__name__
    needed = [p.name for p in signature(cls).parameters.values() if p.default is Parameter.empty]
    return f"{cls.__name__} is the class: give {argument}={name}({', '.join(needed)})"


def function_hint(wrapper: str, function: Any, count: int, name: str, wanted: str) -> str:
    """A function of Python was given; with `count` arguments it may be FlexAttention's."""
    hint = f"a function must be a module-level @triton.jit one, {wanted}"
    try:
        names = list(signature(function).parameters)
    except (TypeError, ValueError):  # of C, without a signature
        names = []
    if len(names) != count:
        return hint
    return (
        f"{hint}; FlexAttention's {name}({', '.join(names)}) can stand beside it for plain PyTorch, as "
        f"tilewise.{wrapper}, twin={name})"
    )


def shape_hint(name: str, given: tuple[int, ...], shape: Shape) -> str:
    """How a tensor of one number a pair would fit the scores of a call of this shape; "" if nobody knows."""
    batch, q_heads, q_len, kv_len = shape.scores
    if shape.kv_heads > kv_len and fits(given, (batch, q_len, q_heads, shape.kv_heads)):
        return FLASH_LAYOUT
    if fits(given, (batch, kv_len)):
        padding = "tilewise.Padding(lengths), or " if name == "mask" else ""
        return f"[batch, kv_len] is {padding}{name}[:, None, None, :]"
    if fits(given, (batch, q_len, kv_len)):
        return f"[batch, q_len, kv_len] is {name}[:, None]"
    if fits(given, (batch, shape.kv_heads, q_len, kv_len)):
        return f"a head of keys serves {shape.group} of queries: {name}.repeat_interleave({shape.group}, 1)"
    if fits(given, (batch, q_heads, kv_len, q_len)[4 - len(given) :]) and len(given) >= 2:
        return f"queries come before keys: {name}.transpose(-1, -2)"
    return ""


def with_hint(reason: str, hint: str) -> str:
    return f"{reason}: {hint}" if hint else reason
