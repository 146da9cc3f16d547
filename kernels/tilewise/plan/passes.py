"""Forward and backward of a request: its tiles are chosen, its kernels launched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import torch

from ..kernels.backward import launch_dkv, launch_dq
from ..kernels.call import Call, Split
from ..kernels.combine import launch_combine
from ..kernels.forward import launch_forward, rows_programs
from ..kernels.one_walk import launch_dqkv
from ..kernels.parameters import parameter_gradient
from ..kernels.prepare import NO_GRADIENTS, BackwardCall, prepare
from ..kernels.tile import HopperBackwardTile, HopperTile, Tile
from ..parts.fp8 import FP8, NARROWEST_FP8
from ..parts.place import own_part, place_parameter
from ..parts.scores.score import Parameter
from ..parts.shape import Shape, ceil_div
from .bind import bind
from .implementation import backward_implementation, implementation
from .request import Request
from .rules import hopper as hopper_rules
from .tiles import choose_tile, choose_walks, square_tile, widest

Tensor = torch.Tensor


def run_forward(
    request: Request, return_lse: bool, for_backward: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """out [batch, q_heads, q_len, value_dim] in `out_dtype` and q's memory order (or the one given, filled),
    lse [batch, q_heads, q_len], and the statistics [2, batch, q_heads, q_len] of `launch_forward`; with
    packed sequences 1 for batch."""
    q, shape = request.q, request.shape
    rows = q.shape[:3]
    out = empty_in_order_of(q, shape.value_dim, request.out_dtype) if out is None else out
    lse = q.new_empty(rows, dtype=torch.float32) if return_lse else None
    statistics = q.new_empty((2, *rows), dtype=torch.float32) if for_backward else None
    call = bind(request)
    if implementation(request) == "hopper":
        launch_hopper(request, call, out, lse, statistics)
        return out, lse, statistics
    tile = forward_tile(q, shape)
    split = split_keys(shape, tile, multiprocessors(q.device))
    if split is None:
        launch_forward(call, out, lse, statistics, tile)
    else:
        parts = q.new_empty((split.programs, *out.shape), dtype=torch.float32)
        parts_lse = q.new_empty((split.programs, *rows), dtype=torch.float32)
        launch_forward(call, parts, parts_lse, None, tile, split)
        launch_combine(parts, parts_lse, out, lse)
        if statistics is not None:  # nobody asks for them: a cache has no backward
            statistics.zero_()
    return out, lse, statistics


def forward_tile(q: Tensor, shape: Shape) -> Tile:
    """The tile of the forward; of fp8, whose matmuls take no fewer, it has 32 keys a step at least."""
    tile = choose_tile(q, shape, "forward")
    if q.dtype == FP8 and tile.tile_kv < NARROWEST_FP8:
        return replace(tile, tile_kv=NARROWEST_FP8)
    return tile


PROGRAMS_AT_ONCE = 2  # that a multiprocessor should have for its loads to overlap


def split_keys(shape: Shape, tile: Tile, processors: int) -> Split | None:
    """How the keys of a cache are split over programs: as the caller says, or so that there are enough for
    a chip of so many multiprocessors; None if in one piece, or no cache. Lengths are the device's, so that
    each sequence's own keys are split, and the host knows but the capacity."""
    cache, capacity = shape.cache, shape.kv_len
    if cache is None:
        return None
    if cache.split_size is not None:
        return Split(max(1, ceil_div(capacity, cache.split_size)), cache.split_size)
    programs = max(1, rows_programs(shape, True, tile.tile_q))
    room = ceil_div(PROGRAMS_AT_ONCE * processors, programs)
    count = min(room, capacity // (2 * tile.tile_kv))
    return Split(count, 0) if count > 1 else None


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU. Without one, a few."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch_hopper(
    request: Request, call: Call, out: Tensor, lse: Tensor | None, statistics: Tensor | None
) -> None:
    """The forward of Hopper's kernel, which Gluon is imported for. Where a graph was compiled before, it is
    only now that the chip and the addresses are known."""
    from ..kernels.hopper.launch import launch_forward

    for rule in (hopper_rules.chip_is_hopper, hopper_rules.tensors_can_be_copied):
        if (reason := rule(request)) is not None:
            raise ValueError(f"impl='hopper': {reason}")
    tile = choose_tile(request.q, request.shape, "hopper")
    if not isinstance(tile, HopperTile):  # forced on all passes by `tiles.use`
        raise ValueError(f"impl='hopper' needs a HopperTile, not {tile}")
    launch_forward(call, out, lse, statistics, tile)


def run_backward(
    request: Request, out: Tensor, statistics: Tensor, do: Tensor, dlse: Tensor | None, needs: list[bool],
    dtype: torch.dtype | None = None, of_rows: tuple[tuple[Tensor, ...], ...] = NO_GRADIENTS,
) -> list[Tensor]:  # fmt: skip
    """The gradients of those of (q, k, v, *other tensors) that `needs` names, in order; each in the dtype of
    what it is the gradient of, or in this one. of_rows: what statistics hand in, as for `prepare`."""
    q, k, v, shape = request.q, request.k, request.v, request.shape
    in_order = request.deterministic or torch.are_deterministic_algorithms_enabled()
    has_all = needs[0] and (needs[1] or needs[2])
    in_hopper = has_all and backward_implementation(request) == "hopper"
    is_in_two = in_order or request.has_holes  # one walk adds by ranges: it would visit the holes
    in_one_walk = has_all and not in_hopper and choose_walks(q, shape, is_in_two) == 1
    tile = choose_tile(q, shape, "hopper_backward" if in_hopper else "dqkv" if in_one_walk else "dkv")
    # The kernels index statistics and dlse as dense arrays.
    dlse = None if dlse is None else dlse.contiguous()
    backward = prepare(bind(request), out, statistics.contiguous(), do, dlse, tile.tile_q, of_rows)
    grads: dict[int, Tensor] = {}
    if needs[0]:
        grads[0] = empty_in_order_of(q, shape.head_dim, dtype)
    if needs[1] or needs[2]:
        grads[1] = empty_in_order_of(k, shape.head_dim, dtype)
        grads[2] = empty_in_order_of(v, shape.value_dim, dtype)
    if in_hopper:
        launch_hopper_backward(backward, grads[0], grads[1], grads[2], tile, in_order)
    elif in_one_walk:
        launch_dqkv(backward, grads[0], grads[1], grads[2], tile, in_order)
    else:
        if needs[0]:
            launch_dq(backward, grads[0], choose_tile(q, shape, "dq"))
        if needs[1] or needs[2]:
            launch_dkv(backward, grads[1], grads[2], tile)
    others = request.other_tensors
    slots = parameter_slots(request)
    # The parameters' kernel is a portable one, and may have ranges for tiles of its own.
    square = square_tile(choose_tile(q, shape, "dkv") if in_hopper else tile, widest(shape))
    if square.tile_q != tile.tile_q and any(needs[3 + slot] for slot, *_ in slots):
        backward = prepare(backward.call, out, statistics.contiguous(), do, dlse, square.tile_q, of_rows)
    for slot, modifier, parameter in slots:
        if needs[3 + slot]:
            tensor = others[slot][1]
            grads[3 + slot] = grad_of_parameter(request, backward, modifier, parameter, tensor, square, dtype)
    for slot, (name, tensor) in enumerate(others):
        if name == "sink" and needs[3 + slot]:
            grad = sink_gradient(tensor, backward.row_max, backward.sum_log2, backward.delta, *of_rows[0])
            grads[3 + slot] = grad.to(dtype or tensor.dtype)
    return [grads[i] for i, needed in enumerate(needs) if needed]


def launch_hopper_backward(
    backward: BackwardCall, dq: Tensor, dk: Tensor, dv: Tensor, tile: Tile, deterministic: bool
) -> None:
    """dQ, dK and dV of Hopper's kernel, which Gluon is imported for."""
    from ..kernels.hopper.backward.launch import launch_backward

    if not isinstance(tile, HopperBackwardTile):  # forced on it by `tiles.use`
        raise ValueError(f"impl='hopper' needs a HopperBackwardTile, not {tile}")
    launch_backward(backward, dq, dk, dv, tile, deterministic)


def parameter_slots(request: Request) -> list[tuple[int, int, Parameter]]:
    """Each parameter of a score: its place in `other_tensors`, its modifier's place in `chain`, itself."""
    return [(slot, modifier, parameter) for slot, modifier, _, parameter in named_slots(request)]


def named_slots(request: Request) -> list[tuple[int, int, str, Parameter]]:
    """The same with the name that its modifier knows it by."""
    names = [name for name, _ in request.other_tensors]
    found = []
    own = len(request.similarity_scores.scores)
    for modifier, score in enumerate(request.chain[:own]):
        for name, parameter in score.parameters(request.shape).items():
            found.append((names.index(name), modifier, name, parameter))
    slot = len(names) - sum(len(score.tensors()) for score in request.scores)
    for modifier, score in enumerate(request.scores, start=own):
        parameters = score.parameters(request.whole)
        for name in score.tensors():
            if name in parameters:
                found.append((slot, modifier, name, parameters[name]))
            slot += 1
    return found


def grad_of_parameter(
    request: Request, backward: BackwardCall, modifier: int, parameter: Parameter, tensor: Tensor, tile: Tile,
    dtype: torch.dtype | None,
) -> Tensor:  # fmt: skip
    """The gradient of a modifier's tensor."""

    def gradient(parameter: Parameter, tensor: Tensor) -> Tensor:
        return parameter_gradient(backward, modifier, parameter, tensor, tile, dtype)

    return of_own_part(request, modifier, parameter, tensor, gradient, dtype)


def of_own_part(
    request: Request, modifier: int, parameter: Parameter, tensor: Tensor,
    gradient: Callable[[Parameter, Tensor], Tensor], dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of a modifier's tensor by a function that says it of what the call reads; of a part's
    tensor, 0 where it reads nothing."""
    place, shape = request.place, request.shape
    if place is None or modifier < len(request.similarity_scores.scores):
        return gradient(parameter, tensor)
    whole = torch.zeros_like(tensor, dtype=dtype)
    own = own_part(whole, parameter, place, shape)
    own.copy_(gradient(place_parameter(parameter, place, shape), own).view(own.shape))
    return whole


def sink_gradient(
    sink: Tensor, row_max: Tensor, sum_log2: Tensor, delta: Tensor, dentropy: Tensor | None = None
) -> Tensor:
    """dsink = -Σ P_sink · (delta + dH · ln P_sink): a sink is one more key, whose value is 0."""
    p = sink_weights(sink, row_max, sum_log2)
    if dentropy is not None:
        delta = delta + torch.where(p > 0, dentropy * p.log(), 0.0)
    return -(p * delta).sum((0, 2))


def sink_weights(sink: Tensor, row_max: Tensor, sum_log2: Tensor) -> Tensor:
    """P_sink [batch, q_heads, q_len]. Maxima are in natural units wherever there is a sink."""
    p = torch.exp2((sink.to(row_max.dtype)[:, None] - row_max) / math.log(2) - sum_log2)
    return torch.where(row_max == -torch.inf, 0.0, p)


def empty_in_order_of(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor with x's first three sizes and `dim`, dense, its dimensions in memory in the order of x's, so
    that a caller who transposed [batch, length, heads, dim] inputs can transpose back without a copy. In x's
    dtype, or this one."""
    if x.is_contiguous():
        return x.new_empty((*x.shape[:3], dim), dtype=dtype)
    order = [0, 1, 2]
    for a, b in ((0, 1), (1, 2), (0, 1)):  # sorted() by stride, which a compiler cannot trace for all lengths
        if x.stride(order[a]) < x.stride(order[b]):
            order[a], order[b] = order[b], order[a]
    sizes = [x.shape[axis] for axis in order]
    return x.new_empty((*sizes, dim), dtype=dtype).permute(*[order.index(axis) for axis in range(3)], 3)
