"""Is the forward right on numbers of 8 bits, and are these made right?

Every sequence is held against float64 of what its numbers stand for, and may be as far from it as plain fp8
attention lets it (bench/answers_fp8.py). On a GPU only where that multiplies such numbers.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

import tilewise
from tilewise.plan.tiles import architecture, multiplies_fp8
from tilewise.quantized import Quantized
from tilewise_reference.masks import causal
from tilewise_reference.yardstick import largest_difference

from ..answers_fp8 import Fp8Problem, judge_numbers, scale_of_rows
from ..judgement import judge
from .trial import NotApplicable, Trial

Tensor = torch.Tensor
Per = Any  # "tensor", "head", or the rows of a tile
Numbers = tuple[Tensor, Tensor]  # [blocks, heads, length, dim], and the scale of each row

Q_HEADS, KV_HEADS, ROWS = 4, 2, 64
TINY_ROWS = 16  # of such a tile in the interpreter
EVERY = slice(None)
OUTLIER = 30.0  # by which one column of q, k and v is larger, as models have it


class Answer(NamedTuple):
    """One sequence of a call: what was multiplied, and what came out."""

    numbers: tuple[Numbers, Numbers, Numbers]  # of q, k and v
    out: Tensor
    lse: Tensor


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(shape, device=device)
    x[..., 3] *= OUTLIER
    return x.to(dtype)


def numbers_of(made: Quantized) -> list[Numbers]:
    """Of q, k and v. Packed ones are one block."""
    found = []
    for x8, scale in zip(made[:3], made.scales[:3], strict=True):
        x8 = x8.transpose(0, 1)[None] if x8.dim() == 3 else x8
        of_rows = scale_of_rows(scale, made.scales.rows, x8.shape[2])
        found.append((x8, of_rows.expand(*x8.shape[:3], 1)))
    return found


def cut(numbers: Numbers, block: int, rows: slice = EVERY) -> Numbers:
    """Those rows of a block."""
    x8, scale = numbers
    return x8[block : block + 1, :, rows], scale[block : block + 1, :, rows]


def in_order(numbers: Numbers, pages: Tensor) -> Numbers:
    """The rows of each sequence, of those in pages."""
    x8, scale = (x[pages.long()].transpose(1, 2).flatten(2, 3) for x in numbers)
    return x8, scale


def dense(device: torch.device, dim: int, how: dict[str, Any], options: dict[str, Any]) -> list[Answer]:
    batch, q_len, kv_len = (2, 900, 1100) if device.type == "cuda" else (1, 37, 45)
    q, k, v = (
        random(device, batch, heads, length, dim)
        for heads, length in ((Q_HEADS, q_len), (KV_HEADS, kv_len), (KV_HEADS, kv_len))
    )
    made = tilewise.quantize(q, k, v, **how)
    out, lse = tilewise.attention(*made[:3], scales=made.scales, **options)
    of_q, of_k, of_v = numbers_of(made)
    return [
        Answer((cut(of_q, b), cut(of_k, b), cut(of_v, b)), out[b : b + 1], lse[b : b + 1])
        for b in range(batch)
    ]


def packed(device: torch.device, dim: int, how: dict[str, Any], options: dict[str, Any]) -> list[Answer]:
    lengths = (700, 1, 333, 129) if device.type == "cuda" else (23, 1, 18)
    bounds = [0, *accumulate(lengths)]
    q, k, v = (random(device, bounds[-1], heads, dim) for heads in (Q_HEADS, KV_HEADS, KV_HEADS))
    made = tilewise.quantize(q, k, v, **how)
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    out, lse = tilewise.packed_attention(*made[:3], q_offsets=offsets, scales=made.scales, **options)
    of_q, of_k, of_v = numbers_of(made)
    return [
        Answer(
            (cut(of_q, 0, rows), cut(of_k, 0, rows), cut(of_v, 0, rows)),
            out[rows].transpose(0, 1)[None],
            lse[:, rows][None],
        )
        for rows in itertools.starmap(slice, pairwise(bounds))
    ]


def cached(
    device: torch.device, dim: int, how: dict[str, Any], options: dict[str, Any], page_size: int | None = None
) -> list[Answer]:
    """A few rows on sequences of several lengths. Pages lie in the cache in no order."""
    lengths, size = ((5000, 1, 777), 5000) if device.type == "cuda" else ((45, 1, 20), 48)
    q = random(device, len(lengths), Q_HEADS, 3, dim)
    blocks, rows, pages = len(lengths), size, None
    if page_size is not None:
        each = -(-size // page_size)
        blocks, rows = blocks * each, page_size
        pages = torch.randperm(blocks, dtype=torch.int32).view(-1, each)
    k, v = (random(device, blocks, KV_HEADS, rows, dim) for _ in range(2))
    made = tilewise.quantize(q, k, v, **how)
    given = made[:3] if pages is None else (made.q, made.k.transpose(1, 2), made.v.transpose(1, 2))
    options = options | dict(
        kv_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        pages=None if pages is None else pages.to(device),
    )
    out, lse = tilewise.cached_attention(*given, scales=made.scales, **options)
    of_q, of_k, of_v = numbers_of(made)
    if pages is not None:
        of_k, of_v = (in_order(x, pages) for x in (of_k, of_v))
    return [
        Answer(
            (cut(of_q, b), cut(of_k, b, slice(length)), cut(of_v, b, slice(length))),
            out[b : b + 1],
            lse[b : b + 1],
        )
        for b, length in enumerate(lengths)
    ]


CALLS: dict[str, Callable[..., list[Answer]]] = {
    "dense": dense,
    "packed": packed,
    "a cache": cached,
    "a cache in pages": functools.partial(cached, page_size=16),
}


def must_multiply_fp8(device: torch.device) -> None:
    if device.type == "cuda" and not multiplies_fp8(architecture(device)):
        needed = "it needs a GPU that multiplies fp8 (sm_90 and newer)"
        raise NotApplicable(f"{needed}, and this one is {architecture(device)}")


def judged(
    call: str, dim: int, per: Per, is_causal: bool, rotate: bool, device: torch.device, seed: int
) -> str:
    """Hold out and lse of every sequence of a call against float64."""
    must_multiply_fp8(device)
    torch.manual_seed(seed)
    per = at_size(per, device)
    options: dict[str, Any] = dict(impl="portable", return_lse=True)
    options |= dict(mask=tilewise.Causal()) if is_causal else {}
    answers = CALLS[call](device, dim, dict(per=per, rotate=rotate, impl="portable"), options)
    wanted, plain, sizes = [], [], []
    for answer in answers:
        (q, q_scale), (k, k_scale), (v, v_scale) = answer.numbers
        sizes.append(f"{q.shape[2]} x {k.shape[2]}")
        masks = dict(mask=causal(q.shape[2], k.shape[2])) if is_causal else {}
        problem = Fp8Problem(q, k, v, masks, (q_scale, k_scale, v_scale), answer.out.dtype)
        wanted.append(problem.exact_forward())
        plain.append(problem.plain_forward())
    for i, name in enumerate(("out", "lse")):
        torch_error = max(
            largest_difference(own[i], want[i]) for own, want in zip(plain, wanted, strict=True)
        )
        for answer, want in zip(answers, wanted, strict=True):
            judgement = judge(name, getattr(answer, name), want[i], torch_error)
            assert not judgement.wrong, judgement.wrong
    return ", ".join(sizes)


def made_right(dtype: str, per: Per, rotate: bool, device: torch.device, seed: int) -> str:
    """Hold the numbers that `quantize` makes against what they are made of, and without a rotation against
    the reference's bits."""
    must_multiply_fp8(device)
    torch.manual_seed(seed)
    per = at_size(per, device)
    sizes = (2, 3, 1000, 96) if device.type == "cuda" else (1, 2, 37, 24)
    q, k, v = (random(device, *sizes, dtype=getattr(torch, dtype)) for _ in range(3))
    k[:, 0] = 0.0
    made = tilewise.quantize(q, k, v, per=per, rotate=rotate, impl="portable")
    for name, x, x8, scale in zip("qkv", (q, k, v), made[:3], made.scales[:3], strict=True):
        judgement = judge_numbers(name, x, x8, scale, per, rotate and name != "v")
        assert not judgement.wrong, judgement.wrong
    return " x ".join(map(str, sizes))


def at_size(per: Per, device: torch.device) -> Per:
    return TINY_ROWS if per == ROWS and device.type != "cuda" else per


def words_of(per: Per) -> str:
    return f"a scale for each {per if isinstance(per, str) else f'{per} rows'}"


def _forward(call: str, dim: int, per: Per, is_causal: bool, rotate: bool = False) -> Trial:
    words = [f"fp8: {call}", f"width {dim}", words_of(per), "causal" if is_causal else "full"]
    words += ["rotated"] if rotate else []
    return Trial(", ".join(words), functools.partial(judged, call, dim, per, is_causal, rotate))


def _made(dtype: str, per: Per, rotate: bool) -> Trial:
    words = f"fp8: quantize {dtype}, {words_of(per)}{', rotated' if rotate else ''}"
    return Trial(words, functools.partial(made_right, dtype, per, rotate))


FP8: list[Trial] = [
    _forward("dense", 128, "head", is_causal=True),
    _forward("dense", 128, ROWS, is_causal=False),
    _forward("dense", 64, "tensor", is_causal=False),
    _forward("dense", 64, ROWS, is_causal=True, rotate=True),
    _forward("dense", 256, "head", is_causal=True, rotate=True),
    _forward("dense", 256, ROWS, is_causal=False),
    _forward("packed", 128, "head", is_causal=True),
    _forward("packed", 64, ROWS, is_causal=True),
    _forward("a cache", 128, "head", is_causal=True),
    _forward("a cache", 64, ROWS, is_causal=False),
    _forward("a cache in pages", 128, 8, is_causal=True),
    _made("bfloat16", "head", rotate=False),
    _made("float16", "tensor", rotate=False),
    _made("float32", ROWS, rotate=False),
    _made("bfloat16", ROWS, rotate=True),
    _made("float32", "head", rotate=True),
]
