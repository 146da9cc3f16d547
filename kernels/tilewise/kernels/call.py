"""One call, ready for the kernels: masks and scores tied to its sizes; and what every kernel is told."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch

from ..parts.fp8 import FP8, NARROWEST_FP8, ValueScales
from ..parts.masks.mask import BoundMask
from ..parts.numerics import INTERPRETED, float32_precision
from ..parts.pieces import NARROWEST, pieces_of
from ..parts.scores.score import BoundScore
from ..parts.shape import Shape, ceil_div, next_power_of_two


class Call(NamedTuple):
    """What forward and backward have in common; `checks` has passed it."""

    shape: Shape
    q: torch.Tensor  # [batch, q_heads, q_len, head_dim]; with packed sequences 1 for batch, as for k and v
    k: torch.Tensor  # [batch, kv_heads, kv_len, head_dim]
    v: torch.Tensor  # [batch, kv_heads, kv_len, value_dim]
    sink: torch.Tensor | None  # [q_heads]
    masks: tuple[BoundMask, ...]
    scores: tuple[BoundScore, ...]
    unit: float | None  # of what the scores leave: softmax.py
    operand: Any  # what Q and K become before the backward multiplies them: similarity.py
    project: Any  # finishes a tile of dQ or dK
    has_gaps: bool
    dropout: tuple[Any, ...]
    is_grouped: bool = False  # the forward's tiles of rows hold those of all heads of a group
    has_holes: bool = False  # walks are over lists of tiles: coverage.py
    v_scales: ValueScales = ValueScales()  # what v's numbers stand for, where they are fp8


class Split(NamedTuple):
    """The keys of a sequence over `programs`, `size` of them each; 0: as many as each sequence needs."""

    programs: int
    size: int


class RowStats(NamedTuple):
    """Where the forward writes what else it knows of a row, each contiguous [.., q_heads, rows] or None:
    statistics.py."""

    entropy: torch.Tensor | None = None  # fp32
    max_logit: torch.Tensor | None = None  # fp32
    largest: torch.Tensor | None = None  # int32

    def given(self) -> tuple[tuple[torch.Tensor, ...], ...]:
        """For a kernel: () where nothing is asked for."""
        found = tuple([() if each is None else (each,) for each in self])
        return found if any(found) else ()


NO_STATS = RowStats()


def power_of_two_tile(dim: int) -> int:
    """The columns of a tile that holds rows of `dim`: a power of two, at least the 16 a matmul needs."""
    return max(16, next_power_of_two(dim))


def function_arguments(call: Call) -> dict[str, Any]:
    """What every walk over tiles is told of masks and scores: functions, and what these are given."""
    return dict(
        mask_args=tuple([mask.args for mask in call.masks]),
        score_args=tuple([score.args for score in call.scores]),
        INTERVALS=tuple([mask.interval for mask in call.masks]),
        SCORES=tuple([score.score for score in call.scores]),
    )


def sizes_of(shape: Shape) -> tuple[int, int, int, int]:
    """(q_heads, query heads that share a head of keys and values, rows of q, rows of k and v)."""
    return shape.q_heads, shape.group, shape.q_len, shape.kv_len


def tile_count(shape: Shape, rows: int, tile_rows: int) -> int:
    """How many numbers the tiles of one head have, as `sequences.tiles_of` says on the device."""
    if shape.packing is None:
        return ceil_div(rows, tile_rows)
    return rows // tile_rows + shape.batch + 2


def programs(shape: Shape, rows: int, tile_rows: int, heads: int) -> int:
    """How many programs there are, if each owns a tile of these rows of one of these heads."""
    return tile_count(shape, rows, tile_rows) * heads * shape.blocks if rows else 0


def key_programs(shape: Shape, tile_keys: int, heads: int) -> int:
    """How many programs there are, if each owns a tile of keys of one of these heads."""
    if shape.cache is None:
        return programs(shape, shape.kv_len, tile_keys, heads)
    return ceil_div(shape.kv_len, tile_keys) * heads * shape.batch


def shared_arguments(call: Call) -> dict[str, Any]:
    """The arguments that every portable kernel takes, by the names they have there.

    `call` is one tuple of tensors, sizes and what acts on scores:

        pointers, strides        of q, k and v; by (pointer, strides), gfx942's forward takes more registers
        sizes                    as `sizes_of` has them
        layout                   where sequences lie: sequences.py
        unit                     exp(score) = exp(s · unit) for the s that SCORES leave; None: natural units
        dropout                  seed, threshold and factor, or ()
        mask_args, score_args    what the functions in INTERVALS and KEEPS, and those in SCORES, are given
    """
    shape, functions = call.shape, function_arguments(call)
    narrowest = NARROWEST_FP8 if call.q.dtype == FP8 else NARROWEST
    return dict(
        call=(
            (call.q, call.k, call.v),
            (call.q.stride(), call.k.stride(), call.v.stride()),
            sizes_of(shape),
            shape.layout,
            call.unit,
            call.dropout,
            functions["mask_args"],
            functions["score_args"],
        ),
        INTERVALS=functions["INTERVALS"],
        KEEPS=tuple([mask.keep for mask in call.masks]),
        SCORES=functions["SCORES"],
        HEAD_DIM=shape.head_dim,
        VALUE_DIM=shape.value_dim,
        HEAD_TILE=pieces_of(shape.head_dim, narrowest),
        VALUE_TILE=pieces_of(shape.value_dim),
        PRECISION=float32_precision(),
        enable_fp_fusion=True,
    )


NO_CONTEXT = contextlib.nullcontext()


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels launched inside run on the tensor's device, whichever is current outside. Where they are
    interpreted, it is NumPy that computes: it warns of NaN and infinities, which padding and biases may hold
    and a GPU takes without a word. The setting is this thread's, which is the one that interprets."""
    if INTERPRETED:
        import numpy as np

        return np.errstate(over="ignore", invalid="ignore")
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return NO_CONTEXT
