"""How does a request become a workload? What the kernels read, train and compute beside q, k and v."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ...kernels.parameter_walks import EACH_PAIR, plan
from ...kernels.tile import Pass, Tile
from ...parts.numerics import INTERPRETED, float32_precision
from ...parts.scores.relative_position import RelativePosition
from ...parts.scores.score import Parameter
from ...parts.scores.softcap import Softcap
from ...parts.shape import Shape
from ...parts.similarity import Normalised
from ...plan.passes import parameter_slots
from ...plan.quadratic import holds_every_pair, stored_bytes
from ...plan.request import Request
from ...plan.rules.hopper import BACKWARD_RULES
from ...plan.tiles import arch_choice, arch_walks, architecture, choose_walks, tile_choice
from ..chips import Chip
from .coverage import has_contents
from .parts import parts_of
from .workload import Allocation, Extra, TileChoice, TrainedParameter, Workload, row_count


def as_workload(
    request: Request, chip: Chip, training: bool, return_lse: bool, on_its_gpu: bool, is_hopper: bool = False
) -> Workload:
    """The request as the model sees it. on_its_gpu: `chip` is the GPU that q is on, whose own tiles count.
    is_hopper: the forward is Hopper's, and the backward where its rules let it. Of fp8 there is no
    training."""
    training = training and request.scales is None
    computed = tuple(computed_tensors(request))
    softcaps = sum(isinstance(score, Softcap) for score in request.scores)
    return Workload(
        shape=request.shape,
        chip=chip,
        parts=parts_of(request.masks, request.shape),
        choose=tile_choices(request.q, request.shape, chip, on_its_gpu),
        element_bytes=request.q.element_size(),
        precision=float32_precision(),
        training=training,
        return_lse=return_lse,
        extras=(*extras(request), *(Extra(x.name, x.bytes, False) for x in computed)),
        parameters=tuple(trained(request)) if training and 0 not in request.shape.scores else (),
        computed=computed,
        of_scores=softcaps,
        of_derivatives=softcaps,
        is_hopper=is_hopper,
        walks=walks_of(request, chip, on_its_gpu),
        has_holes=request.has_holes,
        is_hopper_backward=is_hopper and request.impl == "hopper" and not any(backward_rules(request)),
        out_element_bytes=None if request.scales is None else request.out_dtype.itemsize,
    )


def backward_rules(request: Request) -> Iterator[str]:
    """Why Hopper's backward does not take a call whose forward is Hopper's."""
    return (reason for rule in BACKWARD_RULES if (reason := rule(request)) is not None)


def walks_of(request: Request, chip: Chip, on_its_gpu: bool) -> int:
    """In how many walks the portable backward makes dQ, dK and dV: all three are asked for."""
    in_order = request.deterministic or torch.are_deterministic_algorithms_enabled() or request.has_holes
    if on_its_gpu and not INTERPRETED:
        return choose_walks(request.q, request.shape, in_order)
    return arch_walks(chip.arch, request.q.element_size(), request.shape, in_order)


def tile_choices(q: torch.Tensor, shape: Shape, chip: Chip, on_its_gpu: bool) -> TileChoice:
    """The tile that a pass gets, and whence, as a function of the bytes of an element."""

    def choose(element_bytes: int, work: Pass) -> tuple[Tile, str]:
        if not on_its_gpu or INTERPRETED:
            return arch_choice(chip.arch, element_bytes, shape, work)
        if element_bytes == q.element_size():
            return tile_choice(q, shape, work)
        return arch_choice(architecture(q.device), element_bytes, shape, work)

    return choose


def extras(request: Request) -> Iterator[Extra]:
    """Every tensor besides q, k and v once, by the name of its argument."""
    seen: set[int] = set()
    leaves = (leaf for part in request.plugs for leaf in part.leaves())
    of_parts = {id(t): leaf for leaf in leaves for t in leaf.tensors().values()}
    for name, tensor in request.other_tensors:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            part = of_parts.get(id(tensor))
            every_pair = part is not None and holds_every_pair(part, tensor, request.shape)
            pairs = pairs_of(tensor, request.shape) if every_pair else 0
            yield Extra(name, stored_bytes(tensor), every_pair, pairs)


def pairs_of(tensor: torch.Tensor, shape: Shape) -> int:
    """How many pairs of all batches and heads a tensor with a number for each of them has, or broadcasts to.
    Of packed sequences and of a cache it has more than they do: each reads its part of the last two."""
    lengths = shape.scores[2:] if shape.is_dense or tensor.dim() < 2 else tensor.shape[-2:]
    return shape.batch * shape.q_heads * math.prod(lengths)


def computed_tensors(request: Request) -> Iterator[Allocation]:
    """What scores compute for the kernels at each call."""
    shape = request.shape
    for score in request.chain:
        if isinstance(score, Normalised):
            rows = row_count(shape) + math.prod(request.k.shape[:3])
            yield Allocation("1 / |q| and 1 / |k|", 4 * rows, "during the call")
        elif isinstance(score, RelativePosition):
            distances = shape.q_heads * (2 * score.max_distance + 1)
            yield Allocation("table by distance", distances * score.table.element_size(), "during the call")


def trained(request: Request) -> Iterator[TrainedParameter]:
    """The parameters of scores that get a gradient."""
    for slot, _, parameter in parameter_slots(request):
        name, tensor = request.other_tensors[slot]
        if tensor.requires_grad and tensor.numel():
            yield as_trained(name, parameter, tensor, request.shape)


def as_trained(name: str, parameter: Parameter, tensor: torch.Tensor, shape: Shape) -> TrainedParameter:
    def programs(tile: int) -> int:
        return math.prod(plan(parameter, tensor, shape, tile).own)

    def sums(tile: int) -> tuple[int, bool]:
        planned = plan(parameter, tensor, shape, tile)
        is_gradient = planned.sum is EACH_PAIR
        return math.prod(planned.sums) * (tensor.element_size() if is_gradient else 4), is_gradient

    return TrainedParameter(name, tensor.numel() * tensor.element_size(), programs, sums)


def looks_swapped(shape: Shape) -> bool:
    """Whether heads and length may have changed places: many more heads than rows and keys, in number such as
    lengths have, and as many rows and keys as heads can have."""
    many, few = shape.q_heads, shape.q_len
    is_lopsided = many >= 64 and many >= 4 * few and shape.kv_heads >= 4 * shape.kv_len
    return is_lopsided and shape.kv_len >= 1 and shape.q_len >= 1 and shape.q_len % shape.kv_len == 0


def notes(request: Request, work: Workload) -> Iterator[str]:
    """What a reader of the counts must know."""
    if request.scales is not None:
        out = str(request.out_dtype).removeprefix("torch.")
        yield f"out is {out}, as scales.dtype says; fp8 has a forward alone, and no backward follows"
    if work.training and work.is_hopper:
        for reason in backward_rules(request):
            yield f"the portable backward follows, for Hopper's does not take the call: {reason}"
    if looks_swapped(work.shape) and work.shape.packing is not None:
        yield (
            f"{work.shape.q_heads} heads of {work.shape.q_len} tokens: if q, k and v are [heads, tokens, "
            "dim], give transpose(0, 1) of each; packed, tokens come first"
        )
    elif looks_swapped(work.shape):
        yield (
            f"{work.shape.q_heads} heads of {work.shape.q_len} queries: if q, k and v are [batch, length, "
            "heads, dim], as FlashAttention has them, give transpose(1, 2) of each; here heads come first"
        )
    if work.parts.assumed:
        yield "the offsets have no contents here: what is counted is that of sequences of equal length"
    if request.cache is not None and not has_contents(request.cache.kv_lens):
        yield "the lengths have no contents here: every sequence counts as one that fills its cache"
    for unknown in work.parts.unknown:
        yield f"{unknown}; tiles that it may leave out count as visited and masked: these are upper bounds"
    for name, masks in (("a bool mask", "Dense"), ("a keep function", "UserMask")):
        if any(type(leaf).__name__ == masks for mask in request.masks for leaf in mask.leaves()):
            yield f"{name} may leave out more pairs than are counted here; no tile is saved by that"
    if any(type(score).__name__ == "UserScore" for score in request.scores):
        yield "what a UserScore computes is not in the exponentials or FLOPs"
    if (
        not work.training
        and request.cache is None
        and (request.q.requires_grad or any(t.requires_grad for _, t in request.other_tensors))
    ):
        yield 'inputs require a gradient: work="training" explains the backward too'
