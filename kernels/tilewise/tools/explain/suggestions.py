"""What would make a call faster? One function a suggestion; each speaks up only where it applies.

Where the model can tell what a suggestion is worth, it is asked twice, as the call is and as it would be; the
factor is the ratio of the two least times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...parts.bounds import Bounds
from ...parts.fp8 import FP8
from ...parts.masks.causal import Causal
from ...parts.masks.dense import Dense
from ...parts.masks.documents import Documents
from ...parts.masks.user import UserMask
from ...parts.pieces import padded_columns
from ...parts.scores.bias import Bias
from ...parts.shape import Align, Shape
from ...plan.quadratic import mebibytes
from ...plan.request import Request
from .coverage import has_contents, pairs_that_count
from .parts import Part, Parts
from .workload import Kernel, Workload, kernels_of, seconds

WORTH_SAYING = 1.05
READ_AT_ONCE = 1 << 24  # elements of a bool mask


@dataclass(frozen=True)
class Suggestion:
    """What to change. factor: how much less the least time would be; None where the model cannot tell."""

    text: str
    factor: float | None = None


@dataclass(frozen=True)
class Look:
    """What a rule looks at: the call, and what the model makes of it."""

    request: Request
    work: Workload
    kernels: tuple[Kernel, ...]
    hopper_could: bool = False  # Hopper's forward takes the call on this chip, and is not the one explained

    def factor(self, changed: Workload) -> float:
        """How many times the least time of `changed` the call takes at least."""
        after = seconds(changed)
        return seconds(self.work) / after if after else 1.0

    def matmul_is_largest(self) -> bool:
        return any(kernel.limits.largest == "matmul" for kernel in self.kernels if kernel.tiles)


def suggestions(look: Look) -> tuple[Suggestion, ...]:
    """What applies, the most worth first."""
    found = [suggestion for rule in RULES if (suggestion := rule(look)) is not None]
    return tuple(sorted(found, key=lambda s: -(s.factor or 0.0)))


# ---- Masks


def bool_mask_skips_nothing(look: Look) -> Suggestion | None:
    for mask in look.request.masks:
        if isinstance(mask, Dense):
            if has_contents(mask.mask):
                return structure_of(mask, look)
            if len(look.request.masks) == 1:
                return Suggestion(
                    "a bool mask skips no tile: where a structured mask bounds it, combine the two, as in "
                    "mask=tilewise.Causal() & mask (explain sees which, if the mask has contents)"
                )
    return None


def structure_of(mask: Dense, look: Look) -> Suggestion | None:
    """The structured mask that says the same as this one, or bounds it, if that skips tiles."""
    parts = look.work.parts
    hulls = [
        rows_of_a_bool_mask(part.along(mask.mask, "bhqk", False).expand(part.shape.scores)) for part in parts
    ]
    name, bounds = bounding_mask(hulls, parts)
    same = all(map(says_the_same, hulls, bounds, [part.shape for part in parts]))
    others = parts.with_masks((part for part in look.request.masks if part is not mask), look.work.shape)
    changed = replace(look.work, parts=others.within(bounds, whole=same))
    if same:
        changed = replace(changed, extras=tuple(x for x in changed.extras if x.name != mask.called("mask")))
    worth = look.factor(changed)
    if worth < WORTH_SAYING:
        return None
    if same:
        text = f"the bool mask says what {name} says: give that in its place; it stores nothing"
        return Suggestion(f"{text} for each pair, and skips tiles", worth)
    return Suggestion(
        f"the bool mask keeps no pair outside {name}: mask={name} & mask skips the tiles beyond", worth
    )


def says_the_same(hull: Bounds, bounds: Bounds, shape: Shape) -> bool:
    """Whether a bool mask of that hull keeps the pairs in these bounds, and no others."""
    ends = ((hull.lo, bounds.lo), (hull.hi, bounds.hi))
    return bool(hull.whole.all()) and all(
        bool((of_hull == of_mask.clamp(0, shape.kv_len)).all()) for of_hull, of_mask in ends
    )


def bounding_mask(hulls: list[Bounds], parts: Parts) -> tuple[str, list[Bounds]]:
    """The simplest structured mask that keeps all that rows keep, and not many pairs more: its name, and its
    own bounds in each part. hulls: what rows keep there."""
    if all(hull.hi.shape[1:] == (1, 1) and not bool((hull.lo > 0).any()) for hull in hulls):
        return "tilewise.Padding(lengths)", hulls
    kept = sum(int((hull.hi - hull.lo).sum()) for hull in hulls)
    aligns: tuple[Align, Align] = ("bottom_right", "top_left")
    for align in aligns:
        bounds = [Causal(align).bounds(part.shape) for part in parts]
        ends = [each.hi.clamp(0, part.shape.kv_len) for each, part in zip(bounds, parts, strict=True)]
        pairs = list(zip(hulls, ends, strict=True))
        bounded = all(bool(((hull.hi <= hi) | (hull.hi <= hull.lo)).all()) for hull, hi in pairs)
        if bounded and sum(int(hi.expand(hull.hi.shape).sum()) for hull, hi in pairs) <= 1.1 * kept:
            return "tilewise.Causal()" if align == "bottom_right" else "tilewise.Causal('top_left')", bounds
    return "tilewise.Intervals(first key kept, last key kept + 1)", hulls


def rows_of_a_bool_mask(mask: torch.Tensor) -> Bounds:
    """The first key that each row keeps, its last + 1, and whether it keeps all between; a few rows at a
    time. Expanded dimensions are read once."""
    for axis in range(3):
        if mask.stride(axis) == 0 and mask.shape[axis] > 1:
            mask = mask.narrow(axis, 0, 1)
    a_row = max(1, mask.shape[0] * mask.shape[1] * mask.shape[3])
    found = []
    for chunk in mask.split(max(1, READ_AT_ONCE // a_row), 2):
        kept = chunk.to("cpu", torch.uint8)
        count = kept.sum(3, dtype=torch.int64)
        if kept.shape[3] == 0:
            found.append((count, count, count == 0))
            continue
        lo = kept.argmax(3)
        hi = torch.where(count > 0, kept.shape[3] - kept.flip(3).argmax(3), lo)
        found.append((lo, hi, hi - lo == count))
    lo, hi, whole = (torch.cat(parts, 2) for parts in zip(*found, strict=True))
    return Bounds(lo, hi, whole)


def user_mask_without_interval(look: Look) -> Suggestion | None:
    for mask in look.request.masks:
        if isinstance(mask, UserMask) and mask.interval is None:
            return Suggestion(
                f"UserMask({mask.keep.__name__}) has no interval: it skips no tile, and is asked about every "
                "pair. Give UserMask(..., interval=f) if it rules out whole stretches of keys"
            )
    return None


def documents_in_pieces(look: Look) -> Suggestion | None:
    parts = look.work.parts
    for mask in look.request.masks:
        if not isinstance(mask, Documents) or not has_contents(mask.hulls):
            continue
        if mask.kv_ids is not mask.ids or bool((mask.hulls[..., 2] != 0).all()):
            continue
        if not all(have_ids(part, mask.ids) for part in parts):
            continue
        others = [part for part in look.request.masks if part is not mask]
        bounds = [Documents(part.along(mask.ids, "bq").sort(-1).values).bounds(part.shape) for part in parts]
        without = parts.with_masks(others, look.work.shape)
        worth = look.factor(replace(look.work, parts=without.within(bounds, whole=not others)))
        if worth >= WORTH_SAYING:
            return Suggestion(
                "documents come in pieces, so that a row visits all keys between its document's first and "
                "last: put the positions of a document next to one another",
                worth,
            )
    return None


def have_ids(part: Part, ids: torch.Tensor) -> bool:
    """Whether every token of these sequences has one id, as query and as key."""
    return part.shape.q_len == part.shape.kv_len <= ids.shape[-1]


# ---- Numbers and their layout


def float32_is_slow(look: Look) -> Suggestion | None:
    work = look.work
    if work.element_bytes != 4:
        return None
    half = look.factor(replace(work, element_bytes=2))
    if half < WORTH_SAYING:
        return None
    text = "fp32 inputs: bf16 or fp16 ones are multiplied by tensor cores and are half the bytes"
    if work.precision == "ieee":
        tf32 = look.factor(replace(work, precision="tf32"))
        text += (
            f'; torch.set_float32_matmul_precision("high") gives TF32 ({tf32:.1f}×), with 10 bits a factor'
        )
    return Suggestion(text, half)


def dimensions_are_padded(look: Look) -> Suggestion | None:
    shape = look.work.shape
    given = shape.head_dim, shape.value_dim
    padded = look.work.columns_of_q, padded_columns(shape.value_dim)
    waste = sum(padded) / sum(given)
    if waste < 1.1 or not look.matmul_is_largest():
        return None
    after = sum(max(k.limits.matmul / waste, k.limits.exponentials, k.limits.memory) for k in look.kernels)
    before = seconds(look.work)
    names = f"head_dim={given[0]}" + (f" and value_dim={given[1]}" if given[0] != given[1] else "")
    tiles = " and ".join(str(dim) for dim in dict.fromkeys(padded))
    return Suggestion(
        f"{names} is multiplied as {tiles}, {waste:.2f} times the work; 80, 96, 160, 192 and powers of two "
        "waste none",
        before / after if after else None,
    )


def rows_are_not_contiguous(look: Look) -> Suggestion | None:
    # Of fp8 the matmuls read columns of V: `quantize` lays each in one piece.
    of_rows = {name: x for name, x in look.request.qkv().items() if name != "v" or x.dtype != FP8}
    found = [f"{name} ({x.stride(3)})" for name, x in of_rows.items() if strided_inside(x)]
    if not found:
        return None
    return Suggestion(
        f"the innermost dimension has a stride: {', '.join(found)}. A row's numbers are then loaded one by "
        "one: lay them out side by side, as contiguous() does"
    )


def strided_inside(x: torch.Tensor) -> bool:
    return x.shape[3] > 1 and x.stride(3) != 1


def rows_are_not_aligned(look: Look) -> Suggestion | None:
    found = []
    for name, x in look.request.qkv().items():
        steps = [x.stride(axis) * x.element_size() for axis in range(3) if x.shape[axis] > 1]
        where = [f"strides of {step} bytes" for step in steps if step % 16]
        if has_contents(x) and x.data_ptr() % 16:
            where.append("its address")
        if where and not strided_inside(x):
            found.append(f"{name} ({where[0]})")
    if not found:
        return None
    return Suggestion(
        f"not a multiple of 16 bytes: {', '.join(found)}. Loads are then split: allocate rows of a multiple "
        "of 16 bytes and slice them, or copy to fresh memory"
    )


def heads_are_expanded(look: Look) -> Suggestion | None:
    k, v = look.request.k, look.request.v
    if k.shape[1] == 1 or k.stride(1) != 0 or v.stride(1) != 0:
        return None
    return Suggestion(
        f"k and v are one head, expanded to {k.shape[1]}: give k[:, :1] and v[:, :1]. Query heads share a "
        "head of keys and values by themselves, and its gradient is then one sum, not one a head"
    )


# ---- Work


def hopper_is_not_asked(look: Look) -> Suggestion | None:
    """Where matmuls and exponentials take turns, and there is a forward that overlaps them."""
    if not look.hopper_could:
        return None
    (forward, *others), work = look.kernels, look.work
    try:
        (overlapping, *_) = kernels_of(replace(work, is_hopper=True))
    except NotImplementedError:  # no tile of its own fits
        return None
    before, after = forward.limits.in_turns, overlapping.limits.overlapped
    rest = sum(kernel.limits.in_turns for kernel in others)
    worth = (before + rest) / (after + rest) if after else 1.0
    if worth < WORTH_SAYING:
        return None
    return Suggestion(
        "impl='hopper' asks for the forward that overlaps matmuls and exponentials, where those of the "
        "portable one come nearer to taking turns; no GPU has run it yet, so that its time is a guess",
        worth,
    )


def few_programs(look: Look) -> Suggestion | None:
    (kernel, *_), chip = look.kernels, look.work.chip
    if not 0 < kernel.busy < chip.multiprocessors:
        return None
    shape = look.work.shape
    each = "a row tile of a head" if shape.q_len > 1 else "a head of a sequence"
    if shape.cache is not None:
        each = "a row tile of a head of keys, and a split of these"
    return Suggestion(
        f"{kernel.busy} programs, one for {each}, leave {chip.multiprocessors - kernel.busy} of "
        f"{chip.multiprocessors} multiprocessors idle: more sequences in a call cost little until all work",
        None if kernel.limits.largest == "memory" else chip.multiprocessors / kernel.busy,
    )


def bias_of_every_pair(look: Look) -> Suggestion | None:
    names = {s.called("bias") for s in look.request.scores if isinstance(s, Bias)}
    full = [extra for extra in look.work.extras if extra.every_pair and extra.name in names]
    if not full:
        return None
    work = replace(
        look.work,
        extras=tuple(extra for extra in look.work.extras if extra not in full),
        parameters=tuple(p for p in look.work.parameters if p.name not in names),
    )
    worth = look.factor(work)
    if worth < WORTH_SAYING:
        return None
    size = mebibytes(sum(extra.stored_bytes for extra in full))
    return Suggestion(
        f"a bias for every pair is {size} to read: a score computed from positions (tilewise.ALiBi, "
        "RelativePosition, UserScore), or a bias that broadcasts, reads next to nothing",
        worth,
    )


def tiles_are_wide(look: Look) -> Suggestion | None:
    """Tiles that cover many more pairs than count, as under a window narrower than a tile."""
    (kernel, *_), work = look.kernels, look.work
    counted = work.parts.counted(pairs_that_count)
    if kernel.tiles is None or not counted or work.shape.q_len < kernel.tile.tile_q:
        return None
    covered = kernel.tiles.visited * kernel.tile.tile_q * kernel.tile.tile_kv / counted
    if covered < 1.5 or kernel.limits.largest == "memory":
        return None
    how = "`tilewise tune` tries them on your GPU"
    if look.request.scales is not None:
        how = "give them by tilewise.tiles.use: tuning knows no fp8"
    if work.shape.packing is not None:
        how = "give them by tilewise.tiles.use: how long packed sequences are chooses no tile"
    return Suggestion(
        f"tiles of {kernel.tile.tile_q} × {kernel.tile.tile_kv} cover {covered:.1f} pairs for each that "
        f"counts: smaller ones waste less ({how})"
    )


def dropout_has_a_price(look: Look) -> Suggestion | None:
    if look.request.dropout is None:
        return None
    passes = "forward, dq and dkv" if look.work.training else "the forward"
    return Suggestion(
        f"dropout draws Philox numbers in {passes}: ten rounds for every four pairs, some ten integer "
        "multiplications a pair beside one exponential; leave it out where the model allows it"
    )


def plain_pytorch_was_asked_for(look: Look) -> Suggestion | None:
    if look.request.impl != "torch":
        return None
    return Suggestion(
        "impl='torch' takes every score through memory, several times: leave impl out, and a GPU runs the "
        "fused kernel"
    )


Rule = Callable[[Look], "Suggestion | None"]
RULES: tuple[Rule, ...] = (
    bool_mask_skips_nothing,
    user_mask_without_interval,
    documents_in_pieces,
    float32_is_slow,
    dimensions_are_padded,
    rows_are_not_contiguous,
    rows_are_not_aligned,
    heads_are_expanded,
    hopper_is_not_asked,
    few_programs,
    bias_of_every_pair,
    tiles_are_wide,
    dropout_has_a_price,
    plain_pytorch_was_asked_for,
)
