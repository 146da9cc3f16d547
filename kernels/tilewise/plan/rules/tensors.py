"""Rules on q, k and v alone; all others may rely on them."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...parts.bounds import UNLIMITED
from ...parts.fp8 import FP8
from ...parts.hints import FLASH_LAYOUT, with_hint
from ...parts.shape import FLOATS, ceil_div
from ..request import Request

MAX_HEAD_DIM, MAX_VALUE_DIM = 576, 512


def tensors_are_given(r: Request) -> str | None:
    found = []
    for name, tensor in r.qkv().items():
        if not isinstance(tensor, torch.Tensor):
            found.append(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
        elif tensor.layout != torch.strided:
            found.append(f"{name}.layout={tensor.layout} must be torch.strided (a plain dense tensor)")
    return "; ".join(found) or None


def ranks_are_four(r: Request) -> str | None:
    wrong = {name: tensor for name, tensor in r.qkv().items() if tensor.dim() != 4}
    if not wrong:
        return None
    shapes = ", ".join(f"{name}.shape={tuple(tensor.shape)}" for name, tensor in wrong.items())
    hints = dict.fromkeys(rank_hint(name, tensor) for name, tensor in wrong.items())
    return with_hint(
        f"{shapes} must have 4 dimensions, [batch, heads, length, dim]", "; ".join(filter(None, hints))
    )


def rank_hint(name: str, x: torch.Tensor) -> str:
    """How a tensor of another rank becomes one of four dimensions."""
    heads = f"{name}.unflatten(-1, (heads, dim)).transpose(1, 2) for [batch, length, heads · dim]"
    if x.dim() == 3:
        return heads if x.shape[2] > MAX_HEAD_DIM else f"{name}[None] for [heads, length, dim], {heads}"
    if x.dim() == 5 and 3 in x.shape:
        where = list(x.shape).index(3)
        return f"q, k and v packed into one tensor are {name}.unbind({where}), each with heads before length"
    return {2: f"{name}[None, None] for one head", 5: f"{name}.flatten(0, 1) for two leading dimensions"}.get(
        x.dim(), ""
    )


def with_four_dimensions(r: Request) -> Request | None:
    """The request as if missing leading dimensions were there, in the batch of those that have one, so that
    all else can be judged; None where that is not what is missing."""
    given = r.qkv().values()
    if not all(2 <= x.dim() <= 4 and (x.dim() == 4 or x.shape[-1] <= MAX_HEAD_DIM) for x in given):
        return None
    batch = max([x.shape[0] for x in given if x.dim() == 4], default=1)
    q, k, v = (x if x.dim() == 4 else x[(None,) * (4 - x.dim())].expand(batch, -1, -1, -1) for x in given)
    return replace(r, q=q, k=k, v=v)


def flash_hint(r: Request) -> str:
    """What to say of heads and lengths that would fit one another if they changed places."""
    (k_heads, k_len), (v_heads, v_len), q_len = r.k.shape[1:3], r.v.shape[1:3], r.q.shape[2]
    fits = k_heads == v_heads and k_len == v_len and k_len >= 1 and q_len >= 1 and q_len % k_len == 0
    return FLASH_LAYOUT if fits and k_heads > k_len else ""


def offsets_fit(r: Request) -> str | None:
    """Those of packed sequences: their dtypes and shapes."""
    return None if r.packing is None else "; ".join(r.packing.misfits()) or None


def tokens_agree(r: Request) -> str | None:
    """One packing for queries and keys means as many of both."""
    tokens, kv_tokens = r.q.shape[2], r.k.shape[2]
    if r.packing is None or r.cache is not None:
        return None
    if r.packing.kv_offsets is not None or tokens == kv_tokens:
        return None
    return (
        f"kv_offsets=None says that keys are packed as queries are, but q has {tokens} tokens and k "
        f"{kv_tokens}: give kv_offsets"
    )


def batches_agree(r: Request) -> str | None:
    q, k, v = r.q.shape[0], r.k.shape[0], r.v.shape[0]
    if r.cache is not None:
        batch, is_paged = r.shape.batch, r.cache.pages is not None
        if k == v and (is_paged or k == batch):
            return None
        counts = f"cache_k: {k}, cache_v: {v}"
        return (
            f"{counts} pages must be equal" if is_paged else f"batch sizes q: {batch}, {counts} must be equal"
        )
    return None if q == k == v else f"batch sizes q: {q}, k: {k}, v: {v} must be equal"


def kv_heads_agree(r: Request) -> str | None:
    k, v = r.k.shape[1], r.v.shape[1]
    return None if k == v else f"head counts k: {k}, v: {v} must be equal"


def heads_have_a_whole_ratio(r: Request) -> str | None:
    q_heads, kv_heads = r.q.shape[1], r.k.shape[1]
    if q_heads >= 1 and kv_heads >= 1 and q_heads % kv_heads == 0:
        return None
    return with_hint(f"{q_heads=} must be a multiple of {kv_heads=}, and neither may be 0", flash_hint(r))


def kv_lengths_agree(r: Request) -> str | None:
    k, v = r.k.shape[2], r.v.shape[2]
    return None if k == v else f"lengths k: {k}, v: {v} must be equal"


def lengths_are_indexable(r: Request) -> str | None:
    q_len, kv_len = r.q.shape[2], r.k.shape[2]
    return None if max(q_len, kv_len) < UNLIMITED else f"{q_len=} and {kv_len=} must be below {UNLIMITED}"


def grid_is_launchable(r: Request) -> str | None:
    batch, q_heads, q_len, _ = r.q.shape
    tiles = ceil_div(q_len, 16)
    if r.packing is not None:
        tiles = max(q_len, r.k.shape[2]) // 16 + r.shape.batch + 2
    programs = batch * q_heads * tiles
    if programs < 1 << 31:
        return None
    return f"{batch=} · {q_heads=} · {q_len=} needs {programs} programs, above 2³¹ - 1: split the batch"


def head_dims_agree(r: Request) -> str | None:
    q, k = r.q.shape[3], r.k.shape[3]
    if q == k:
        return None
    is_transposed = (k, q) == (r.v.shape[2], r.k.shape[2])
    hint = "k comes as v does, [batch, heads, length, dim]: not transposed" if is_transposed else ""
    return with_hint(f"head_dim of q: {q}, k: {k} must be equal", hint)


def dims_are_supported(r: Request) -> str | None:
    dims = (("head_dim", r.q.shape[3], MAX_HEAD_DIM), ("value_dim", r.v.shape[3], MAX_VALUE_DIM))
    wrong = [f"{name}={dim} must be from 1 to {most}" for name, dim, most in dims if not 1 <= dim <= most]
    return "; ".join(wrong) or None


def dtypes_agree(r: Request) -> str | None:
    q, k, v = r.q.dtype, r.k.dtype, r.v.dtype
    return None if q == k == v else f"dtypes q: {q}, k: {k}, v: {v} must be equal; cast them to one"


def dtype_is_supported(r: Request) -> str | None:
    if r.q.dtype in (*FLOATS, FP8) or (r.q.dtype == torch.float64 and r.impl in (None, "torch")):
        return None
    if r.q.dtype == torch.float64:
        return (
            f"q.dtype=torch.float64, and impl={r.impl!r} takes torch.float16, torch.bfloat16 or "
            "torch.float32: leave impl=None for plain PyTorch, which computes in float64"
        )
    return (
        f"q.dtype={r.q.dtype} must be torch.float16, torch.bfloat16 or torch.float32, torch.float8_e4m3fn "
        "with scales, or torch.float64, which plain PyTorch computes"
    )


def devices_agree(r: Request) -> str | None:
    q, k, v = r.q.device, r.k.device, r.v.device
    return None if q == k == v else f"devices q: {q}, k: {k}, v: {v} must be equal"
