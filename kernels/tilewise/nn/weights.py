"""Linears that do the work of several, and taking over the weights of PyTorch's own modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .sharded import check_not_cut


@torch.enable_grad()  # so that what is trainable here can be read off what the tensors are made from
def fuse_linears(**linears: nn.Linear) -> nn.Linear:
    """One Linear [in_features -> the sum of out_features] that does the work of several on one input.

    Weights are copied, dtype and device kept. Where only some have a bias the others get one of zeros. The
    weight (and likewise the bias) is trainable if that of any of them is. Raises ValueError, by the names
    given, unless all are `nn.Linear` with one in_features, dtype and device.
    """
    check_linears(**linears)
    (first_name, first), *others = linears.items()
    for name, linear in others:
        if linear.in_features != first.in_features:
            raise ValueError(
                f"{name}.in_features={linear.in_features} must equal "
                f"{first_name}.in_features={first.in_features}"
            )
    parts = tuple(linears.values())
    weight = torch.cat(tuple(part.weight for part in parts))
    if all(part.bias is None for part in parts):
        return make_linear(weight, None)
    biases = [
        weight.new_zeros(part.out_features) if part.bias is None else part.bias.view(-1) for part in parts
    ]
    return make_linear(weight, torch.cat(biases))


def apply_fused(
    parts: str, linear: nn.Linear, rows: Sequence[int], inputs: Sequence[Tensor]
) -> Sequence[Tensor]:
    """What each part of a fused Linear, its next `rows`, makes of its own input; one matmul where the inputs
    are all one tensor. parts: a letter each, as the Linear is called."""
    if len(rows) == 1:
        return [linear(inputs[0])]
    if all(x is inputs[0] for x in inputs):
        made = linear(inputs[0])
        check_not_cut(parts, made, sum(rows))
        return made.split(rows, dim=-1)
    biases = [None] * len(rows) if linear.bias is None else linear.bias.split(rows)
    return [F.linear(*part) for part in zip(inputs, linear.weight.split(rows), biases, strict=True)]


def split_linear(linear: nn.Linear, rows: Sequence[int]) -> list[nn.Linear]:
    """A Linear for each part of a fused one, its next `rows`. Weights are copied."""
    weights = linear.weight.detach().split(list(rows))
    biases = [None] * len(rows) if linear.bias is None else linear.bias.detach().split(list(rows))
    made = []
    for weight, bias in zip(weights, biases, strict=True):
        made.append(make_linear(weight.clone(), None if bias is None else bias.clone()))
        made[-1].weight.requires_grad_(linear.weight.requires_grad)
        if made[-1].bias is not None:
            made[-1].bias.requires_grad_(linear.bias.requires_grad)
    return made


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear that holds these tensors, weight [out_features, in_features] and bias [out_features], as its
    parameters; each is trainable if the tensor requires a gradient."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return linear


def copy_out_projection(q: nn.Linear, out: nn.Linear, width: int) -> nn.Linear:
    """A copy of `out`, which must be a Linear [width -> any] of q's dtype and device; else ValueError."""
    check_linears(q=q, out=out)
    if out.in_features != width:
        raise ValueError(f"out.in_features={out.in_features} must be heads * value_dim = {width}")
    return fuse_linears(out=out)


def check_linears(**linears: nn.Linear) -> None:
    """Raise ValueError unless all are `nn.Linear` of one dtype on one device."""
    first = next(iter(linears.values()))
    for name, linear in linears.items():
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name}={linear!r} must be a torch.nn.Linear")
        for what in ("dtype", "device"):
            own, wanted = getattr(linear.weight, what), getattr(first.weight, what)
            if own != wanted:
                raise ValueError(f"{name}'s {what} {own} must be that of the others, {wanted}")


def head_sizes(q: nn.Linear, k: nn.Linear, v: nn.Linear, heads: int, kv_heads: int) -> tuple[int, int]:
    """head_dim and value_dim of projections to `heads` query heads and `kv_heads` key/value heads."""
    for name, linear, counted, count in (("q", q, "heads", heads), ("v", v, "kv_heads", kv_heads)):
        if linear.out_features % count:
            raise ValueError(
                f"{name}.out_features={linear.out_features} must be a multiple of {counted}={count}"
            )
    head_dim = q.out_features // heads
    if k.out_features != kv_heads * head_dim:
        raise ValueError(
            f"k.out_features={k.out_features} must be kv_heads * head_dim = {kv_heads} * {head_dim}, with "
            f"head_dim = q.out_features / heads = {q.out_features} / {heads}"
        )
    return head_dim, v.out_features // kv_heads


@torch.enable_grad()
def multihead_linears(mha: nn.MultiheadAttention) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
    """The q, k, v and out projections of PyTorch's module, as Linears of their own.

    Raises ValueError for any other object, NotImplementedError for an option that tilewise does not have.
    """
    if not isinstance(mha, nn.MultiheadAttention):
        raise ValueError(f"mha={type(mha).__name__} must be a torch.nn.MultiheadAttention")
    if mha.bias_k is not None or mha.bias_v is not None:
        raise NotImplementedError("add_bias_kv=True (bias_k, bias_v) is not built")
    if mha.add_zero_attn:
        raise NotImplementedError("add_zero_attn=True is not built")
    if mha.in_proj_weight is not None:
        weights = mha.in_proj_weight.chunk(3)
    else:  # kdim or vdim differ from embed_dim
        weights = (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
    biases = (None, None, None) if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
    q, k, v = (make_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return q, k, v, mha.out_proj
