"""fp8 numbers as the numbers that they stand for: how plain PyTorch answers a call with scales.

q = q_scale · q8, and so k and v, in fp32 or a wider dtype; nothing else is rounded to 8 bits
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..parts.fp8 import Scales, scale_sizes
from ..plan.request import Request

Tensor = torch.Tensor


def dequantized(request: Request, dtype: torch.dtype = torch.float32) -> Request:
    """A dense request with numbers in place of fp8; any other as it is."""
    if request.scales is None:
        return request
    q, k, v = (
        x.to(dtype) * scale.to(dtype)
        for x, scale in zip(request.qkv().values(), scales_of_rows(request), strict=True)
    )
    return replace(request, q=q, k=k, v=v, scales=None)


def scales_of_rows(request: Request) -> list[Tensor]:
    """For q, k and v a scale for each row, [blocks, heads, rows, 1], to be cut as they are; or, where they do
    not change along rows, [batch, heads, 1, 1]."""
    scales, shape = request.scales, request.shape
    assert scales is not None
    q_sizes, kv_sizes = scale_sizes(shape, scales.rows)
    found = []
    each = (scales.q, q_sizes), (scales.k, kv_sizes), (scales.v, kv_sizes)
    for x, (scale, sizes) in zip(request.qkv().values(), each, strict=True):
        scale = scale.expand(sizes)
        if scales.rows is None:
            found.append(scale[:, :, None, None])
        else:
            found.append(scale.repeat_interleave(scales.rows, 2)[:, :, : x.shape[2], None])
    return found


def own_scales(request: Request, batch: int, cuts: tuple[Callable[[Tensor], Tensor], ...]) -> Scales | None:
    """The scales of the packed sequence, or that of a cache, of this number, as those of a dense request:
    `cuts` cut q, k and v, and what has a number for each of their rows."""
    scales = request.scales
    if scales is None:
        return None
    found = scales_of_rows(request)
    if scales.rows is None:
        q, k, v = (scale[batch : batch + 1, :, 0, 0] for scale in found)
        return scales._replace(q=q, k=k, v=v)
    q, k, v = (cut(scale)[..., 0] for cut, scale in zip(cuts, found, strict=True))
    return scales._replace(q=q, k=k, v=v, rows=1)
