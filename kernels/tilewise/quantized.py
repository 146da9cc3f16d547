"""The public function that makes fp8 numbers of q, k and v."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from .kernels.copies import is_without_memory
from .parts.dtensors import is_dtensor
from .parts.fp8 import FP8, Scales
from .parts.numerics import INTERPRETED
from .parts.shape import FLOATS
from .plan.request import as_heads
from .plan.rules.fp8 import is_transformed, why_no_fp8
from .plan.rules.tensors import MAX_HEAD_DIM
from .pytorch.quantize import quantize as quantize_one

Tensor = torch.Tensor


class Quantized(NamedTuple):
    """q, k and v in float8_e4m3fn, and what they stand for: attention(q, k, v, scales=scales)."""

    q: Tensor
    k: Tensor
    v: Tensor
    scales: Scales


def quantize(
    q: Tensor, k: Tensor, v: Tensor, *, per: Literal["tensor", "head"] | int = "head", rotate: bool = False,
    impl: str | None = None,
) -> Quantized:  # fmt: skip
    """q, k and v as float8_e4m3fn numbers with scales, for `attention`, or packed for `packed_attention`.

    q, k, v: [batch, heads, length, dim] as `attention` takes them, or packed [tokens, heads, dim], in fp16,
            bf16 or fp32; heads and lengths may differ.
    per:    what has a scale of its own: "tensor", "head" (of each sequence; of packed tensors of all), or a
            number of rows of a head. A scale is the largest finite |x| / 448 there, and 1 of zeros; infinity
            becomes ±448, NaN stays.
    rotate: multiply q and k by one orthogonal matrix first, which leaves their products as they are and
            spreads outliers over the columns: a Hadamard matrix in blocks of the largest power of two that
            divides head_dim, at most 128 (QuaRot, arXiv 2404.00456; FlashAttention-3, arXiv 2407.08608).
            It helps where q and k have outliers in common, and costs a little where only one has them
            (docs/fp8.md). Rotary embeddings, which turn by position, come first.
    impl:   "portable", the Triton kernel; "torch", plain PyTorch. None: as for `attention`.

    Returns `Quantized(q, k, v, scales)`. q and k lie in memory as they came; of v each column lies in one
    piece, as Hopper's matmuls of 8 bits read it. scales.dtype, out's, is q's. Everything stays on the device.
    It has no gradient. Raises ValueError for what it does not take, and for GPUs that do not multiply such
    numbers.
    """
    tensors = {"q": q, "k": k, "v": v}
    for reason in misfits(tensors, per, rotate, impl):
        raise ValueError(reason)
    packed = q.dim() == 3
    if packed:
        q, k, v = as_heads(q, k, v)
    way = implementation_for(q) if impl is None else impl
    rows = per if isinstance(per, int) else {"tensor": -1, "head": 0}[per]
    by_op = torch.compiler.is_compiling() or is_without_memory(q)
    run = torch.ops.tilewise.quantize if by_op else quantize_one
    found = [
        run(x, rows, rotate and name != "v", name == "v", way)
        for name, x in zip("qkv", (q, k, v), strict=True)
    ]
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = found
    if packed:
        q8, k8, v8 = (x[0].transpose(0, 1) for x in (q8, k8, v8))
    scales = Scales(q_scale, k_scale, v_scale, per if isinstance(per, int) else None, q.dtype)
    return Quantized(q8, k8, v8, scales)


def implementation_for(x: Tensor) -> str:
    """Who makes the numbers, if nobody says: as in `plan.implementation`."""
    return "portable" if INTERPRETED or x.device.type in ("cuda", "meta") else "torch"


def misfits(tensors: dict[str, Any], per: Any, rotate: Any, impl: Any) -> list[str]:
    """What is wrong with the arguments of `quantize`."""
    found = []
    is_rows = isinstance(per, int) and not isinstance(per, bool) and per >= 1
    if not is_rows and per not in ("tensor", "head"):
        found.append(f"per={per!r} must be 'tensor', 'head' or a number of rows from 1 on")
    if not isinstance(rotate, bool):
        found.append(f"rotate={rotate!r} must be True or False")
    if impl not in (None, "portable", "torch"):
        found.append(f"impl={impl!r} must be None, 'portable' or 'torch'")
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            found.append(f"{name} is a {type(x).__name__}; it must be a torch.Tensor")
            continue
        if x.layout != torch.strided or is_dtensor(x):
            found.append(f"{name} must be a plain dense tensor: of DTensors give each rank its own part")
        if x.dim() not in (3, 4) or x.dim() != getattr(tensors["q"], "dim", int)():
            found.append(
                f"{name}.shape={tuple(x.shape)} must be [batch, heads, length, dim], or packed [tokens, "
                "heads, dim], those of q, k and v alike"
            )
        elif not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            found.append(f"{name}.shape[-1]={x.shape[-1]} must be from 1 to {MAX_HEAD_DIM}")
        if x.dtype not in FLOATS:
            found.append(f"{name}.dtype={x.dtype} must be {', '.join(map(str, FLOATS))}")
        if x.requires_grad and torch.is_grad_enabled():
            found.append(f"{name} requires a gradient, and {FP8} has none: call it under torch.no_grad()")
    if found:
        return found
    q, k, _ = tensors.values()
    if rotate and q.shape[-1] != k.shape[-1]:
        found.append(f"rotate=True with head_dim of q: {q.shape[-1]}, k: {k.shape[-1]}, which must be equal")
    if is_transformed():
        found.append("quantize under torch.func or forward mode is not built: call it outside")
    if impl != "torch" and q.device.type == "cuda" and (why := why_no_fp8(q.device)) is not None:
        found.append(why)
    if impl == "portable" and not INTERPRETED and q.device.type == "cpu":
        found.append("impl='portable' on CPU tensors runs in Triton's interpreter: set TRITON_INTERPRET=1")
    return found
