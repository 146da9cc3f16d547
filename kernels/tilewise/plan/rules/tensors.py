"""Rules on q, k and v alone; all others may rely on them."""

from __future__ import annotations

import torch

from ...parts.bounds import UNLIMITED
from ...parts.shape import FLOATS, ceil_div
from ..request import Request

MAX_DIM = 256


def tensors_are_given(r: Request) -> str | None:
    for name, tensor in r.qkv().items():
        if not isinstance(tensor, torch.Tensor):
            return f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor"
        if tensor.layout != torch.strided:
            return f"{name}.layout={tensor.layout} must be torch.strided (a plain dense tensor)"
    return None


def ranks_are_four(r: Request) -> str | None:
    for name, tensor in r.qkv().items():
        if tensor.dim() != 4:
            return f"{name}.shape={tuple(tensor.shape)} must have 4 dimensions, [batch, heads, length, dim]"
    return None


def batches_agree(r: Request) -> str | None:
    q, k, v = r.q.shape[0], r.k.shape[0], r.v.shape[0]
    return None if q == k == v else f"batch sizes q: {q}, k: {k}, v: {v} must be equal"


def kv_heads_agree(r: Request) -> str | None:
    k, v = r.k.shape[1], r.v.shape[1]
    return None if k == v else f"head counts k: {k}, v: {v} must be equal"


def heads_have_a_whole_ratio(r: Request) -> str | None:
    q_heads, kv_heads = r.q.shape[1], r.k.shape[1]
    if q_heads >= 1 and kv_heads >= 1 and q_heads % kv_heads == 0:
        return None
    return f"{q_heads=} must be a multiple of {kv_heads=}, and neither may be 0"


def kv_lengths_agree(r: Request) -> str | None:
    k, v = r.k.shape[2], r.v.shape[2]
    return None if k == v else f"lengths k: {k}, v: {v} must be equal"


def lengths_are_indexable(r: Request) -> str | None:
    q_len, kv_len = r.q.shape[2], r.k.shape[2]
    return None if max(q_len, kv_len) < UNLIMITED else f"{q_len=} and {kv_len=} must be below {UNLIMITED}"


def grid_is_launchable(r: Request) -> str | None:
    batch, q_heads, q_len, _ = r.q.shape
    programs = batch * q_heads * ceil_div(q_len, 16)
    if programs < 1 << 31:
        return None
    return f"{batch=} · {q_heads=} · {q_len=} needs {programs} programs, above 2³¹ - 1: split the batch"


def head_dims_agree(r: Request) -> str | None:
    q, k = r.q.shape[3], r.k.shape[3]
    return None if q == k else f"head_dim of q: {q}, k: {k} must be equal"


def dims_are_supported(r: Request) -> str | None:
    head_dim, value_dim = r.q.shape[3], r.v.shape[3]
    if 1 <= head_dim <= MAX_DIM and 1 <= value_dim <= MAX_DIM:
        return None
    return f"{head_dim=} and {value_dim=} must be from 1 to {MAX_DIM}"


def dtypes_agree(r: Request) -> str | None:
    q, k, v = r.q.dtype, r.k.dtype, r.v.dtype
    return None if q == k == v else f"dtypes q: {q}, k: {k}, v: {v} must be equal; cast them to one"


def dtype_is_supported(r: Request) -> str | None:
    if r.q.dtype in FLOATS:
        return None
    return f"q.dtype={r.q.dtype} must be torch.float16, torch.bfloat16 or torch.float32"


def devices_agree(r: Request) -> str | None:
    q, k, v = r.q.device, r.k.device, r.v.device
    return None if q == k == v else f"devices q: {q}, k: {k}, v: {v} must be equal"
