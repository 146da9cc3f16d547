"""Rules on what is asked of the softmax beside its result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...parts.dtensors import is_dtensor
from ...parts.shape import FLOATS, INTS, fits
from ...parts.stats import MOST_KEYS, Stats
from ..request import Request

Tensor = torch.Tensor
FLAGS = ("max_logit", "entropy")


def stats_misfits(r: Request, stats: Any) -> Iterator[str]:
    """What is wrong with `return_stats` of a request that is right in itself."""
    if not isinstance(stats, Stats):
        hint = "give tilewise.Stats() with its brackets" if stats is Stats else "or None"
        yield f"return_stats={stats!r} must be tilewise.Stats(...), {hint}"
        return
    for name in FLAGS:
        if not isinstance(given := getattr(stats, name), bool):
            yield f"Stats({name}={given!r}) must be True or False"
    yield from mass_misfits(r, stats.key_mass)
    yield from rows_misfits(r, stats.rows)
    if isinstance(stats.top_k, bool) or not (isinstance(stats.top_k, int) and 0 <= stats.top_k <= MOST_KEYS):
        yield f"Stats(top_k={stats.top_k!r}) must be a number from 0 to {MOST_KEYS}"
    if r.impl == "hopper":
        yield (
            "return_stats is answered by the portable kernels and plain PyTorch, and impl='hopper' asks for "
            "another: leave impl=None"
        )
    if is_dtensor(r.q):
        yield (
            "return_stats of DTensors is not built: give each rank its own part, with .to_local(), or leave "
            "it out"
        )
    if r.place is not None:
        yield "return_stats of a part of a larger call is not built: leave it out"


def mass_misfits(r: Request, given: Any) -> Iterator[str]:
    if isinstance(given, bool):
        return
    wanted = "must be True, False or a bool or float tensor, how much each query counts"
    if not isinstance(given, Tensor):
        yield f"Stats(key_mass={given!r}) {wanted}"
        return
    if given.dtype not in (torch.bool, *FLOATS, torch.float64):
        yield f"Stats(key_mass=) of {given.dtype} {wanted}"
    sizes = tuple(r.q.shape[:3]) if r.packing is None else tuple(r.q.shape[1:3])
    if not fits(tuple(given.shape), sizes):
        names = "[batch, q_heads, q_len]" if r.packing is None else "[q_heads, tokens]"
        yield f"Stats(key_mass=) of shape {tuple(given.shape)} must broadcast to {names} = {list(sizes)}"
    if given.device != r.q.device:
        yield f"Stats(key_mass=) is on {given.device}, q on {r.q.device}: move it with .to(q.device)"
    if given.requires_grad:
        yield "Stats(key_mass=) requires a gradient, and what a query counts has none: detach() it"


def rows_misfits(r: Request, given: Any) -> Iterator[str]:
    if given is None:
        return
    if not isinstance(given, Tensor) or given.dtype not in INTS:
        what = given.dtype if isinstance(given, Tensor) else repr(given)
        yield f"Stats(rows={what}) must be a tensor of dtype torch.int32 or torch.int64"
        return
    if given.dim() != 1:
        yield f"Stats(rows=) of shape {tuple(given.shape)} must be [rows], numbers of queries"
    if given.device != r.q.device:
        yield f"Stats(rows=) is on {given.device}, q on {r.q.device}: move it with .to(q.device)"
