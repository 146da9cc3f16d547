"""What attention can do, as named features: tests draw from this list, docs/support.md is printed from it.

A feature is a function that changes a Problem: it sets a size, a dtype or a memory layout, or adds an
argument that fits the sizes. What a feature leaves open (which corner, how wide a window) it draws from
`problem.rng`: so the same entry serves fixed tests, which give a seed, and hypothesis, which draws.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

import tilewise
from tilewise.kernels.tile import CopiedTile
from tilewise.parts.fp8 import FP8
from tilewise.parts.masks.mask import as_mask

from .problem import FEATURES, KINDS, Feature, Packing, Problem, build, feature, judge, of_kind

__all__ = ["FEATURES", "KINDS", "Feature", "Problem", "build", "judge", "of_kind"]


# ---- Dtypes, heads, dimensions, lengths, tiles


@feature("dtype", "float32")
def float32(p: Problem) -> None:
    p.dtype = torch.float32


@feature("dtype", "float16")
def float16(p: Problem) -> None:
    p.dtype = torch.float16


@feature("dtype", "bfloat16")
def bfloat16(p: Problem) -> None:
    p.dtype = torch.bfloat16


def drawn_scales(p: Problem, rows: int | None) -> tilewise.Scales:
    """Of a tensor, of heads, or of tiles of rows of these, along any of which they may be the same."""
    q_sizes = kv_sizes = [p.batch]
    q_tiles = kv_tiles = []
    if rows is not None:
        q_len, kv_len = (p.q_len, p.kv_len) if p.rows() is None else p.rows().tokens
        q_sizes = kv_sizes = [p.batch if p.rows() is None else 1]
        if p.filled() is not None:
            kv_sizes, kv_len = [p.batch], p.kv_len
            if p.filled().pages is not None:
                kv_sizes, kv_len = [max(1, p.filled().pages.numel())], p.page_size
        q_tiles, kv_tiles = [-(-q_len // rows)], [-(-kv_len // rows)]
    sizes = [[*q_sizes, p.q_heads, *q_tiles], *[[*kv_sizes, p.kv_heads, *kv_tiles]] * 2]
    drawn = [p.randn(*p.broadcast(*each)).abs() + 0.25 for each in sizes]
    return tilewise.Scales(*drawn, rows=rows, dtype=p.rng.choice((torch.bfloat16, torch.float16)))


@feature("dtype", "float8_e4m3fn, forward, with scales of a tensor or of heads, on the device")
def fp8_of_heads(p: Problem) -> None:
    p.dtype, p.scales = FP8, lambda p: drawn_scales(p, None)


@feature("dtype", "float8_e4m3fn, forward, with scales of tiles of rows, on the device")
def fp8_of_rows(p: Problem) -> None:
    rows = p.rng.choice((1, 5, 16))
    p.dtype, p.scales = FP8, lambda p: drawn_scales(p, rows)


@feature("heads", "multi-head: as many key heads as query heads")
def multi_head(p: Problem) -> None:
    p.q_heads = p.kv_heads = p.rng.choice((1, 2, 3))


@feature("heads", "grouped queries: any whole ratio")
def grouped_heads(p: Problem) -> None:
    p.q_heads, p.kv_heads = p.rng.choice(((6, 2), (6, 3), (4, 2)))


@feature("heads", "multi-query: one key head")
def one_kv_head(p: Problem) -> None:
    p.q_heads, p.kv_heads = p.rng.choice((2, 5, 8)), 1


@feature("dims", "head_dim a power of two from 16 to 512")
def power_of_two_dims(p: Problem) -> None:
    p.head_dim = p.value_dim = p.rng.choice((16, 32, 64, 128, 256, 512))


@feature("dims", "any other head_dim from 1 to 576: 80 as 16 + 64 columns, 192 as 64 + 128")
def odd_dims(p: Problem) -> None:
    p.head_dim = p.rng.choice((1, 3, 5, 20, 40, 80, 96, 160, 192, 255, 576))
    p.value_dim = min(p.head_dim, 512)


@feature("dims", "value_dim up to 512, different from head_dim")
def value_dim_differs(p: Problem) -> None:
    p.head_dim, p.value_dim = p.rng.choice(
        ((24, 16), (16, 40), (1, 33), (65, 3), (48, 128), (192, 128), (576, 512))
    )


@feature("lengths", "q_len = kv_len")
def equal_lengths(p: Problem) -> None:
    p.q_len = p.kv_len = p.rng.choice((33, 16, 20, 45)) * p.longer()


@feature("lengths", "q_len < kv_len")
def fewer_queries(p: Problem) -> None:
    p.q_len, p.kv_len = (n * p.longer() for n in p.rng.choice(((17, 45), (15, 16), (2, 40))))


@feature("lengths", "q_len > kv_len")
def fewer_keys(p: Problem) -> None:
    p.q_len, p.kv_len = (n * p.longer() for n in p.rng.choice(((45, 17), (34, 32), (40, 2))))


@feature("lengths", "one query")
def one_query(p: Problem) -> None:
    p.q_len, p.kv_len = 1, p.rng.choice((37, 1, 16)) * p.longer()


@feature("lengths", "one key")
def one_key(p: Problem) -> None:
    p.q_len, p.kv_len = 19 * p.longer(), 1


@feature("lengths", "no query")
def no_query(p: Problem) -> None:
    p.q_len, p.kv_len = 0, p.rng.choice((0, 20))


@feature("lengths", "no key")
def no_key(p: Problem) -> None:
    p.q_len, p.kv_len = 18, 0


@feature("lengths", "no sequence: batch = 0")
def no_batch(p: Problem) -> None:
    p.batch = 0


def offsets_of(p: Problem, longest: int, before: int = 0) -> torch.Tensor:
    """Of sequences no longer than `longest`, which one is; some of the others may have no row."""
    lengths = [p.rng.choice((longest, p.rng.randint(0, longest), 0)) for _ in range(p.batch)]
    lengths[p.rng.randrange(p.batch)] = longest
    starts = torch.tensor([before, *lengths], device=p.device).cumsum(0)
    return starts.to(p.rng.choice((torch.int32, torch.int64)))


@feature("rows", "in a tensor of their own: `attention`")
def dense_rows(p: Problem) -> None:
    p.packed = None


@feature("rows", "packed, queries as keys: `packed_attention`")
def packed_rows(p: Problem) -> None:
    p.kv_len, p.batch = p.q_len, max(1, p.batch)

    def pack(p: Problem) -> Packing:
        offsets = offsets_of(p, p.q_len)
        tokens = int(offsets[-1])
        return Packing(offsets, None, (tokens, tokens))

    p.packed = pack


@feature("rows", "packed, queries and keys of other lengths, among rows of no sequence")
def packed_apart(p: Problem) -> None:
    p.batch = max(1, p.batch)

    def pack(p: Problem) -> Packing:
        offsets = [offsets_of(p, longest, p.rng.choice((0, 3))) for longest in (p.q_len, p.kv_len)]
        tokens, kv_tokens = (int(each[-1]) + p.rng.choice((0, 7)) for each in offsets)
        return Packing(*offsets, (tokens, kv_tokens))

    p.packed = pack


@feature("rows", "in a cache that is filled in part: `cached_attention`, forward alone")
def cached_rows(p: Problem) -> None:
    p.page_size = 0


@feature("rows", "in a cache of pages of any size: `cached_attention`, forward alone")
def paged_rows(p: Problem) -> None:
    p.page_size = p.rng.choice((1, 5, 16, 64))


@feature("tile", "tiles from the table")
def tile_of_the_table(p: Problem) -> None:
    p.tile = None


@feature("tile", "square tiles")
def square_tile(p: Problem) -> None:
    p.tile = p.rng.choice((tilewise.tiles.Tile(16, 16), tilewise.tiles.Tile(32, 32)))


@feature("tile", "oblong tiles")
def oblong_tile(p: Problem) -> None:
    p.tile = p.rng.choice((tilewise.tiles.Tile(16, 32), tilewise.tiles.Tile(32, 16)))


@feature("tile", "tiles by the copy engine")
def copied_tile(p: Problem) -> None:
    p.tile = CopiedTile(16, 16)


@feature("order", "gradients of gradients and forward mode")
def second_order(p: Problem) -> None:
    p.order = 2


# ---- Memory layouts


def dense(p: Problem, shape: tuple[int, ...]) -> torch.Tensor:
    return p.randn(*shape, dtype=p.dtype)


def transposed(p: Problem, shape: tuple[int, ...]) -> torch.Tensor:
    batch, heads, length, dim = shape
    return p.randn(batch, length, heads, dim, dtype=p.dtype).transpose(1, 2)


def sliced(p: Problem, shape: tuple[int, ...]) -> torch.Tensor:
    """A view into a larger storage that is NaN everywhere else; its first address is not aligned."""
    storage = torch.full([size + 3 for size in shape], torch.nan, dtype=p.dtype, device=p.device)
    view = storage[tuple(slice(1, 1 + size) for size in shape)]
    return view.copy_(p.randn(*shape))


def expanded(p: Problem, shape: tuple[int, ...]) -> torch.Tensor:
    axes = p.rng.choice(((0,), (1,), (0, 1), (2,)))
    sizes = [min(size, 1) if axis in axes else size for axis, size in enumerate(shape)]
    return p.randn(*sizes, dtype=p.dtype).expand(shape)


def inner_strided(p: Problem, shape: tuple[int, ...]) -> torch.Tensor:
    batch, heads, length, dim = shape
    if p.rng.random() < 0.5:
        return p.randn(batch, heads, dim, length, dtype=p.dtype).transpose(2, 3)
    return p.randn(batch, heads, length, 2 * dim, dtype=p.dtype)[..., 1::2]


def far_strided(p: Problem, shape: tuple[int, ...]) -> torch.Tensor:
    x = p.randn(*shape, dtype=p.dtype)
    return x.as_strided(shape, [s if n != 1 else 2**40 for s, n in zip(x.stride(), shape, strict=True)])


@feature("layout", "contiguous [batch, heads, length, dim]")
def contiguous_layout(p: Problem) -> None:
    p.layout = dense


@feature("layout", "transposed [batch, length, heads, dim]")
def transposed_layout(p: Problem) -> None:
    p.layout = transposed


@feature("layout", "views into larger storages, at any address")
def sliced_layout(p: Problem) -> None:
    p.layout = sliced


@feature("layout", "expanded (stride 0) batch, heads or length")
def expanded_layout(p: Problem) -> None:
    p.layout = expanded


@feature("layout", "innermost dimension not contiguous")
def inner_strided_layout(p: Problem) -> None:
    p.layout = inner_strided


@feature("layout", "any stride along dimensions of size 1")
def far_strided_layout(p: Problem) -> None:
    p.batch, p.layout = 1, far_strided


@feature("layout", "different layouts for q, k and v")
def mixed_layout(p: Problem) -> None:
    layouts = (dense, transposed, sliced, expanded, inner_strided, far_strided)
    p.layout = lambda problem, shape: problem.rng.choice(layouts)(problem, shape)


# ---- Similarity, scale


@feature("similarity", "scaled dot product")
def scaled_dot(p: Problem) -> None:
    p.arguments["similarity"] = "scaled_dot"


@feature("similarity", "dot product")
def dot(p: Problem) -> None:
    p.arguments["similarity"] = "dot"


@feature("similarity", "cosine")
def cosine(p: Problem) -> None:
    p.arguments["similarity"] = "cosine"


@feature("similarity", "cosine with a temperature, a number or one a head")
def cosine_with_temperature(p: Problem) -> None:
    number = p.rng.random() < 0.3
    p.arguments["similarity"] = tilewise.Cosine(7.5 if number else 5 * p.randn(p.q_heads))


@feature("scale", "scale, a positive number")
def positive_scale(p: Problem) -> None:
    p.arguments["scale"] = p.rng.choice((1.0, 0.3, 1))


@feature("scale", "scale, zero or negative")
def other_scale(p: Problem) -> None:
    p.arguments["scale"] = p.rng.choice((-0.4, 0.0, -1))


@feature("scale", "scale, a tensor on the device")
def tensor_scale(p: Problem) -> None:
    p.arguments["scale"] = p.randn(
        dtype=p.rng.choice((torch.float32, torch.float32 if p.dtype == FP8 else p.dtype))
    )


# ---- Score modifiers, bias, sink


@triton.jit
def checkered_score(s, batch, head, q_idx, kv_idx, args):
    """Scores of every other diagonal take a factor, and each query head an offset."""
    offsets_ptr, factor = args
    return tl.where((q_idx + kv_idx) % 2 == 0, s, s * factor) + tl.load(offsets_ptr + head)


def checkered_score_twin(s, batch, head, q_idx, kv_idx, offsets, factor):
    return torch.where((q_idx + kv_idx) % 2 == 0, s, s * factor) + offsets[head].to(s.dtype)


@triton.jit
def checkered_derivative(s, batch, head, q_idx, kv_idx, args):
    return tl.where((q_idx + kv_idx) % 2 == 0, 1.0, args[1])


@triton.jit
def checkered_by_offset(s, batch, head, q_idx, kv_idx, args):
    return s * 0.0 + 1.0


def any_float(p: Problem) -> torch.dtype:
    return p.rng.choice((torch.float32, torch.float16, torch.bfloat16))


@feature("score", "`Softcap`")
def softcap(p: Problem) -> None:
    p.scores.append(tilewise.Softcap(p.rng.choice((2.0, 0.1, 30))))


@feature("score", "`ALiBi`")
def alibi(p: Problem) -> None:
    slopes = tilewise.alibi_slopes(p.q_heads, p.device)
    if p.rng.random() < 0.5:
        slopes = p.randn(p.batch, p.q_heads, dtype=any_float(p))
    p.scores.append(tilewise.ALiBi(slopes, p.align()))


@feature("score", "`RelativePosition` (T5 buckets)")
def relative_position(p: Problem) -> None:
    buckets, max_distance = p.rng.choice(((8, 12), (32, 128), (12, 7)))
    table = p.randn(p.q_heads, buckets, dtype=any_float(p))
    bidirectional, align = p.rng.random() < 0.5, p.align()
    p.scores.append(tilewise.RelativePosition(table, max_distance, bidirectional, align))


@feature("score", "`Bias` before other modifiers")
def bias_modifier(p: Problem) -> None:
    shape = p.broadcast(p.batch, p.q_heads, p.q_len, p.kv_len)
    p.scores.append(tilewise.Bias(p.randn(*shape, dtype=any_float(p))))


@feature("score", "`UserScore`: a function of your own")
def user_score(p: Problem) -> None:
    args = (p.randn(p.q_heads), p.rng.choice((0.5, -1.0)))
    p.scores.append(
        tilewise.UserScore(
            checkered_score,
            args,
            twin=checkered_score_twin,
            derivative=checkered_derivative,
            parameters={0: ("h", checkered_by_offset)},
            second_derivatives={},
        )
    )


@feature("bias", "bias that broadcasts along any dimension, in any float dtype")
def bias(p: Problem) -> None:
    p.arguments["bias"] = p.randn(*p.broadcast(p.batch, p.q_heads, p.q_len, p.kv_len), dtype=any_float(p))


@feature("bias", "bias with any strides and alignment")
def strided_bias(p: Problem) -> None:
    storage = torch.full((p.batch, p.kv_len + 1, p.q_len + 3, p.q_heads), torch.nan, dtype=any_float(p))
    view = storage.to(p.device)[:, 1:, 2 : 2 + p.q_len].permute(0, 3, 2, 1)
    p.arguments["bias"] = view.copy_(p.randn(*view.shape))


@feature("sink", "sink, a logit a head")
def sink(p: Problem) -> None:
    p.arguments["sink"] = p.randn(p.q_heads, dtype=any_float(p))


@feature("dropout", "dropout from a seed on the device")
def dropout(p: Problem) -> None:
    p.arguments["dropout_p"] = p.rng.choice((0.1, 0.5, 0.9))
    p.arguments["dropout_seed"] = torch.tensor([p.rng.randrange(-(2**63), 2**63)], device=p.device)


# ---- Masks


@triton.jit
def dilated_keep(q_idx, kv_idx, batch, head, args):
    """Every args[0]-th key, counted from the query and the head."""
    return (q_idx + kv_idx + head) % args[0] == 0


def dilated_keep_twin(batch, head, q_idx, kv_idx, step):
    return (q_idx + kv_idx + head) % step == 0


@triton.jit
def block_interval(q_idx, batch, head, args):
    start = q_idx // args[0] * args[0]
    return start, start + args[0], q_idx >= 0


@triton.jit
def block_keep(q_idx, kv_idx, batch, head, args):
    return q_idx // args[0] == kv_idx // args[0]


def block_keep_twin(batch, head, q_idx, kv_idx, size):
    return q_idx // size == kv_idx // size


@feature("mask", "`Causal`, bottom right")
def causal(p: Problem) -> None:
    p.add_mask(tilewise.Causal(p.corner()))


@feature("mask", "`Causal`, top left")
def causal_top_left(p: Problem) -> None:
    p.add_mask(tilewise.Causal("top_left"))


@feature("mask", "`Causal` from a key position, for all sequences or one for each")
def causal_from_a_position(p: Problem) -> None:
    low, high = -p.q_len // 2, p.kv_len + 1
    number = p.rng.random() < 0.3
    p.add_mask(tilewise.Causal(p.rng.randint(low, high) if number else p.integers(low, high, p.batch)))


@feature("mask", "`Window`")
def window(p: Problem) -> None:
    left, right = p.rng.choice(((9, 0), (0, 0), (3, 20), (None, 4), (7, None), (None, None)))
    p.add_mask(tilewise.Window(left, right, p.align()))


@feature("mask", "`Prefix`")
def prefix(p: Problem) -> None:
    p.add_mask(tilewise.Prefix(p.length_or_lengths(), p.align()))


@feature("mask", "`Documents` in one piece")
def documents(p: Problem) -> None:
    rows = (p.batch,) if p.rng.random() < 0.5 else ()
    ids, kv_ids = (p.integers(0, 4, *rows, n).sort(dim=-1).values for n in (p.q_len, p.kv_len))
    p.add_mask(tilewise.Documents(ids, kv_ids))


@feature("mask", "`Documents` in pieces, in any order")
def scattered_documents(p: Problem) -> None:
    rows = (p.batch,) if p.rng.random() < 0.5 else ()
    ids, kv_ids = p.integers(-2, 1, *rows, p.q_len), p.integers(-2, 1, *rows, p.kv_len)
    p.add_mask(tilewise.Documents(ids, None if p.q_len == p.kv_len else kv_ids))


@feature("mask", "`Padding`, right")
def right_padding(p: Problem) -> None:
    p.add_mask(tilewise.Padding(p.length_or_lengths()))


@feature("mask", "`Padding`, left")
def left_padding(p: Problem) -> None:
    p.add_mask(tilewise.Padding(p.length_or_lengths(), side="left"))


@feature("mask", "`Intervals`, one a row")
def intervals(p: Problem) -> None:
    rows = p.broadcast(p.batch, p.q_heads, p.q_len)
    start = p.integers(-3, p.kv_len, *rows)
    p.add_mask(tilewise.Intervals(start, start + p.integers(0, 25, *rows)))


@feature("mask", "a bool tensor that broadcasts along any dimension")
def bool_mask(p: Problem) -> None:
    p.add_mask(p.randn(*p.broadcast(p.batch, p.q_heads, p.q_len, p.kv_len)) > -0.3)


@feature("mask", "`Blocks`: a pattern of blocks of any size, as data")
def blocks(p: Problem) -> None:
    block = p.rng.choice(((16, 16), (32, 16), (5, 7), (16, 40)))
    sizes = [-(-n // side) for n, side in zip((p.q_len, p.kv_len), block, strict=True)]
    sizes = [1 if p.rng.random() < 0.2 else size for size in sizes]
    p.add_mask(tilewise.Blocks(p.randn(*p.broadcast(p.batch, p.q_heads), *sizes) > 0, block))


@feature("mask", "`UserMask`: a function of your own")
def user_mask(p: Problem) -> None:
    p.add_mask(tilewise.UserMask(dilated_keep, (p.rng.choice((2, 3)),), twin=dilated_keep_twin))


@feature("mask", "`UserMask` that skips tiles")
def user_interval(p: Problem) -> None:
    size = p.rng.choice((20, 7))
    p.add_mask(tilewise.UserMask(block_keep, (size,), interval=block_interval, twin=block_keep_twin))


@feature("mask", "`BlockCausal`, all blocks before or the last ones")
def block_causal(p: Problem) -> None:
    p.add_mask(tilewise.BlockCausal(p.rng.choice((1, 5, 7, 16)), p.rng.choice((None, 1, 2, 3)), p.align()))


@feature("mask", "`Neighborhood`, dilated or not, causal or not, on a grid of one to three axes")
def neighborhood(p: Problem) -> None:
    if p.kv_len == 0:  # no grid has no point
        return
    shape, points = [], p.kv_len
    for _ in range(p.rng.choice((0, 1, 2))):
        shape.append(p.rng.choice([n for n in range(1, points + 1) if points % n == 0]))
        points //= shape[-1]
    shape.append(points)
    p.rng.shuffle(shape)
    dilation = [p.rng.randint(1, min(3, n)) for n in shape]
    size = [p.rng.randint(1, n // step) for n, step in zip(shape, dilation, strict=True)]
    causal = [p.rng.random() < 0.3 for _ in shape]
    p.add_mask(
        tilewise.Neighborhood(
            tuple(size), tuple(dilation), shape=tuple(shape), causal=tuple(causal), align=p.align()
        )
    )


OPERANDS = (causal, window, prefix, documents, scattered_documents, right_padding, left_padding, intervals,
            bool_mask, user_mask, user_interval, block_causal, neighborhood)  # fmt: skip


def operand(p: Problem) -> tilewise.Mask:
    """Another mask, not yet among the problem's."""
    others, found = p.mask, None
    while found is None:
        p.mask = None
        p.rng.choice(OPERANDS)(p)
        found = p.mask
    p.mask = others
    return as_mask(found)


@feature("mask", "masks joined by `|`, with `&` and `~` among them")
def either(p: Problem) -> None:
    one, other, third = operand(p), operand(p), operand(p)
    p.add_mask(p.rng.choice((one | other, one | other & third, ~one | other)))


@feature("mask", "a mask turned by `~`, and several together")
def opposite(p: Problem) -> None:
    one, other, third = operand(p), operand(p), operand(p)
    p.add_mask(p.rng.choice((~one, ~(one & other), ~(one & (other | third)))))
