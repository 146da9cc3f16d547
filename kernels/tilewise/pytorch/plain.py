"""Plain PyTorch: what answers on a CPU outside Triton's interpreter, and anywhere for impl="torch".

There are two ways, both in fp32, rounded once to q's dtype at the end; in fp64 where q is.

PyTorch's own fused kernel for CPUs, in `fused`, where it computes the same: no score, sink or dropout; a dot
product times a number; values as wide as keys; and every row sees a key, every key is seen by a row. That is
no mask, or Causal with its corner at the top left, behind which keys are cut off; other corners where they
mean one of these. Its causal mask is multiplied by the scale, so there the scale must be above 0. Memory is
linear in length. The kernel has one derivative, of out alone. Whatever else is asked of it (create_graph, a
gradient of lse, forward mode or batches of gradients) is computed from the definition again: `Fused`.

The definition, `tilewise_reference.attention`, in `in_blocks`: one block of rows after the other, each with
the keys between the first and the last that its rows may see, as far as the host knows these. So a call
holds at most about BLOCK scores at a time, however long the sequences. Where there are several blocks, or
sequences, each is computed again in the backward (`torch.utils.checkpoint`), which holds no more. All
derivatives of all orders are PyTorch's; the graph of a derivative that is to be differentiated again
(create_graph) keeps what all blocks computed.

Function transforms, forward mode and dispatch modes want to see every step: they take the definition, and
what autograd keeps for them is quadratic in length. Under torch.compile and torch.export the definition is
one block, whatever its length, so that a graph serves all lengths; for the same reason Causal goes to the
fused kernel only where lengths are equal by construction. The kernel is then a node with PyTorch's formula,
differentiable once, like all that AOTAutograd compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

import tilewise_reference
from tilewise_reference.scores import additive_bias

from ..parts.masks.causal import Causal
from ..parts.scores.bias import Bias
from ..parts.scores.own_bias import OwnBias
from ..parts.scores.score import Score
from ..parts.shape import Shape, computed_in
from ..parts.similarity import Cosine
from ..plan.implementation import is_watched
from ..plan.passes import empty_in_order_of
from ..plan.request import Request, is_autocast
from .dequantized import dequantized
from .pieces import by_sequence

Tensor = torch.Tensor

BLOCK = 1 << 21  # scores of one block, over batch and heads: 8 MiB for each of a few such matrices
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def run_torch(request: Request, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """out in its dtype and q's memory order, and lse in fp32 or, where q is, fp64."""
    out, lse = unrounded(request, return_lse)
    like = empty_in_order_of(request.q, out.shape[3], request.out_dtype)
    return like.copy_(out), lse if return_lse else None


def unrounded(request: Request, return_lse: bool) -> tuple[Tensor, Tensor]:
    """out and lse in the dtype of scores."""
    q = request.q

    def answer(request: Request, batch: int | None = None) -> tuple[Tensor, Tensor]:
        request = dequantized(request)
        return fused(request) if fused_is_the_same(request, return_lse) else in_blocks(request, batch)

    with torch.autocast(q.device.type, enabled=False) if is_autocast(q.device) else nullcontext():
        return answer(request) if request.shape.is_dense else by_sequence(request, answer)


# ---- PyTorch's fused kernel for CPUs


def fused_is_the_same(request: Request, return_lse: bool) -> bool:
    """Whether `fused` answers this request: the conditions at the head of this file."""
    shape, scale = request.shape, request.scale
    if request.scores or request.sink is not None or request.dropout is not None:
        return False
    if request.similarity not in ("dot", "scaled_dot") or isinstance(scale, Tensor):
        return False
    if request.q.device.type != "cpu" or shape.head_dim != shape.value_dim or is_watched():
        return False
    if request.place is not None and request.masks:  # which are those of a larger call
        return False
    if torch.compiler.is_compiling() and return_lse and request.needs_gradient:
        return False  # lse has no gradient in PyTorch's formula
    if min(shape.batch, shape.q_len, shape.kv_len) == 0:
        return False
    return causal_of(request) is not None


def causal_of(request: Request) -> bool | None:
    """Whether the kernel's causal mask is needed; None if it does not do what the masks say."""
    masks, shape = request.masks, request.shape
    if len(masks) == 0:
        return False
    mask = masks[0]
    if len(masks) > 1 or not isinstance(mask, Causal):
        return None
    first = shape.shift(mask.align)  # the key position of query 0
    if isinstance(first, Tensor):
        return None
    if torch.compiler.is_compiling():  # a graph for lengths to come must not compare them
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

        if isinstance(mask.align, int) or not statically_known_true(shape.q_len == shape.kv_len):
            return None
    elif first != 0:
        return False if first >= shape.kv_len - 1 else None
    return True if request.scale is None or request.scale > 0 else None


def fused(request: Request) -> tuple[Tensor, Tensor]:
    """out and lse [batch, q_heads, q_len, ...] in the dtype of scores."""
    shape, causal, scale = request.shape, bool(causal_of(request)), request.scale
    if scale is None:
        scale = shape.head_dim**-0.5 if request.similarity == "scaled_dot" else 1.0
    k, v = request.k, request.v
    if causal and shape.kv_len > shape.q_len:  # no row sees a key behind the last row
        k, v = (x[:, :, : shape.q_len] for x in (k, v))
    if shape.group > 1:
        k, v = (x.repeat_interleave(shape.group, dim=1) for x in (k, v))
    q, k, v = (with_dense_rows(x.to(computed_in(x.dtype))) for x in (request.q, k, v))
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not request.needs_gradient:
        out, lse = flash(q, k, v, 0.0, causal, scale=scale)
    else:
        out, lse = Fused.apply(causal, float(scale), q, k, v)
    return out, lse.contiguous()


def with_dense_rows(x: Tensor) -> Tensor:
    """x, whose rows lie in memory without gaps: the kernel takes that for granted."""
    return x if x.stride(3) == 1 else x.contiguous()


def score_bytes(request: Request, return_lse: bool, sequences: Iterable[Shape] = ()) -> int:
    """Bytes of a block's score matrix, of the few that a call holds at once; 0 in the fused kernel.

    sequences: the dense calls that one of packed sequences or of a cache is made of, whose batches are
    answered one sequence after the other.
    """
    if not request.shape.is_dense:
        held = [0]
        for shape in sequences:
            q = request.q[:1].narrow(2, 0, shape.q_len)
            k, v = (x[:1, :, :1].expand(-1, -1, shape.kv_len, -1) for x in (request.k, request.v))
            one = replace(request, q=q, k=k, v=v, packing=None, cache=None)
            held.append(score_bytes(one, return_lse))
        return max(held)
    if fused_is_the_same(request, return_lse):
        return 0
    batch, q_heads, q_len, kv_len = request.shape.scores
    rows = min(q_len, rows_of_a_block(request.shape))
    return computed_in(request.q.dtype).itemsize * batch * q_heads * rows * kv_len


class Fused(torch.autograd.Function):
    """The fused kernel with all derivatives: where its own does not do, the definition's."""

    @staticmethod
    def forward(ctx: Any, causal: bool, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse = flash(q, k, v, 0.0, causal, scale=scale)
        ctx.causal, ctx.scale = causal, scale
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[2:4]):
            ctx.mark_non_differentiable(lse)  # which does not depend on v
        return out, lse

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        causal, scale, needs = ctx.causal, ctx.scale, ctx.needs_input_grad[2:]
        if do is not None and dlse is None and not torch.is_grad_enabled() and not is_watched():
            grads = flash_backward(
                with_dense_rows(do), q, k, v, out, lse, 0.0, causal, attn_mask=None, scale=scale
            )
            return None, None, *(grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        if do is None and dlse is None:
            return (None,) * 5
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views of their own, for q, k and v may be one tensor; derivatives go through them to it.
            q, k, v = (x.view_as(x) for x in (q, k, v))
            masks = (Causal("top_left"),) if causal else ()
            out, lse = in_blocks(Request(q, k, v, masks, (), scale, "dot", None, "torch"))
            arrived = [(x, dx) for x, dx in ((out, do), (lse, dlse)) if dx is not None]
            wanted = [x for x, needed in zip((q, k, v), needs, strict=True) if needed]
            results, grads = zip(*arrived, strict=True)
            grads = torch.autograd.grad(results, wanted, grads, create_graph=again, allow_unused=True)
            found = iter(grads)
        return None, None, *(next(found) if needed else None for needed in needs)


# ---- The definition, a block of rows at a time


class Block(NamedTuple):
    """The rows q_start..q_end and the keys kv_start..kv_end; and of the sequences the first, by which masks
    and scores know it."""

    q_start: int
    q_end: int
    kv_start: int
    kv_end: int
    batch: int = 0


def in_blocks(request: Request, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """out and lse [batch, q_heads, q_len, ...] in the dtype of scores; batch: the number of the one packed
    sequence that the request is left of."""
    parts = list(blocks(request, batch))
    several = len(parts) > 1 or batch is not None
    run = run_again if several and can_run_again(request) else run_block
    results = [run(request, block) for block in parts]
    if len(results) == 1:
        return results[0]
    out, lse = (torch.cat(parts, dim=2) for parts in zip(*results, strict=True))
    return out, lse


def run_block(request: Request, block: Block) -> tuple[Tensor, Tensor]:
    q = request.q[:, :, block.q_start : block.q_end]
    k, v = (x[:, :, block.kv_start : block.kv_end] for x in (request.k, request.v))
    arguments = oracle_arguments(request, block)
    return tilewise_reference.attention(q, k, v, **arguments, return_lse=True, dtype=computed_in(q.dtype))


def can_run_again(request: Request) -> bool:
    """Whether the backward may compute blocks again: there is one, nobody wants to see every step, and the
    hooks by which PyTorch does it are not forbidden here."""
    if not request.needs_gradient or torch.compiler.is_compiling() or is_watched():
        return False
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is None


def run_again(
    request: Request, block: Block, compute: Callable[[Request, Block], tuple[Tensor, ...]] | None = None
) -> Any:
    """`run_block`, or what else is computed of a block, which keeps nothing for the backward: that computes
    it again. The tensors must be what they were then; autograd, which notices otherwise, does not keep
    these."""
    tensors = [*request.qkv().values(), *[x for _, x in request.other_tensors]]
    versions = [None if x.is_inference() else x._version for x in tensors]

    def run() -> Any:
        for x, version in zip(tensors, versions, strict=True):
            if version is not None and x._version != version:
                raise RuntimeError(
                    f"a tensor {tuple(x.shape)} of tilewise.attention, needed for its gradient, has been "
                    "modified by an inplace operation since the forward"
                )
        return Tied.apply(*(compute or run_block)(request, block))

    return checkpoint(run, use_reentrant=False, preserve_rng_state=False, determinism_check="none")


class Tied(torch.autograd.Function):
    """The results of a block as they are, in one node, so that the backward walks through all where only some
    have a gradient: what it computes again and does not reach would stay until the whole graph is gone."""

    @staticmethod
    def forward(ctx: Any, *results: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        return tuple([x.view_as(x) for x in results])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return grads


def blocks(request: Request, batch: int | None = None) -> Iterator[Block]:
    """Blocks that hold all rows, and of the keys those that their rows may see."""
    shape = request.shape
    whole = Block(0, shape.q_len, 0, shape.kv_len, batch or 0)
    if torch.compiler.is_compiling() or 0 in shape.scores:
        yield whole
        return
    rows = rows_of_a_block(shape)
    knows_keys = batch is None and request.q.device.type == "cpu" and not is_watched()
    keys = seen_keys(request) if knows_keys else None
    for start in range(0, shape.q_len, rows):
        end = min(start + rows, shape.q_len)
        first, last = 0, shape.kv_len
        if keys is not None:
            first, last = int(keys[0][start:end].min()), int(keys[1][start:end].max())
        yield Block(start, end, min(first, last), last, batch or 0)


def rows_of_a_block(shape: Shape) -> int:
    return max(1, BLOCK // max(1, shape.batch * shape.q_heads * shape.kv_len))


def seen_keys(request: Request) -> tuple[Tensor, Tensor]:
    """The first and one more than the last of the keys that each row may see, by the masks' bounds; int64
    [q_len]. It reads the masks' tensors, which on a CPU costs nothing."""
    shape, whole, (_, _, row, key) = request.shape, request.whole, origin_of(request)
    starts, ends = torch.zeros(shape.q_len, dtype=torch.int64), torch.full((shape.q_len,), shape.kv_len)
    for mask in request.masks:
        bounds = mask.bounds(whole)
        if bounds is not None:
            lo, hi = (x.expand(whole.scores[:3]).flatten(0, 1) for x in bounds[:2])
            lo, hi = (x[:, row : row + shape.q_len] - key for x in (lo, hi))
            starts, ends = starts.maximum(lo.amin(0)), ends.minimum(hi.amax(0))
    return starts.clamp(0, shape.kv_len), ends.clamp(0, shape.kv_len)


def origin_of(request: Request) -> tuple[int, int, int, int]:
    """Where the request begins in the call whose masks and scores it has."""
    return (0, 0, 0, 0) if request.place is None else request.place.origin


def oracle_arguments(request: Request, block: Block | None = None) -> dict[str, Any]:
    """The request as `tilewise_reference.attention` takes it, every mask and score by its twin; for the rows
    and keys of a block, if one is given."""
    shape, whole, similarity, dropped = request.shape, request.whole, request.similarity, {}
    block = Block(0, shape.q_len, 0, shape.kv_len) if block is None else block
    batch, head, row, key = origin_of(request)
    origin = batch + block.batch, head, row + block.q_start, key + block.kv_start
    if request.dropout is not None:
        p, seed = request.dropout
        sizes = (shape.batch, shape.q_heads, block.q_end - block.q_start, block.kv_end - block.kv_start)
        keep = tilewise_reference.dropout_keep(seed, p, sizes, seed.device, origin)
        dropped = dict(dropout_p=p, dropout_keep=keep)
    return dict(
        mask=[shifted(mask.twin(whole), origin) for mask in request.masks],
        score=[twin_in_block(score, request, block, origin) for score in request.scores],
        scale=request.scale,
        similarity="cosine" if isinstance(similarity, Cosine) else similarity,
        temperature=similarity.temperature if isinstance(similarity, Cosine) else None,
        sink=request.sink,
        **dropped,
    )


def shifted(twin: Any, origin: tuple[int, int, int, int]) -> Any:
    """The twin of a mask or a score, for index tensors that count from this sequence, head, row and key."""

    def moved(*given: Tensor) -> Any:
        *before, batch, head, q_idx, kv_idx = given
        at = (x + first for x, first in zip((batch, head, q_idx, kv_idx), origin, strict=True))
        return twin(*before, *at)

    return moved


def twin_in_block(score: Score, request: Request, block: Block, origin: tuple[int, int, int, int]) -> Any:
    if not isinstance(score, Bias):
        return shifted(score.twin(request.whole), origin)
    bias, shape = score.bias, request.shape  # read by its place, not by index
    if isinstance(score, OwnBias):
        origin = score.origin(origin)
    sizes = shape.batch, shape.q_heads, block.q_end - block.q_start, block.kv_end - block.kv_start
    for axis in range(-bias.dim(), 0):
        if bias.shape[axis] > 1:
            bias = bias.narrow(axis, origin[axis], sizes[axis])
    return additive_bias(bias)
