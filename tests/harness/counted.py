"""Calls whose kernels count what they do."""

from __future__ import annotations

import torch
import triton

import tilewise
from tilewise.plan.passes import run_backward, run_forward
from tilewise.plan.request import cached_request, request_of


@triton.jit
def count_steps(s, batch, head, q_idx, kv_idx, args):
    """Score modifier that changes nothing and counts the pairs it is asked about, those beyond the ends too:
    as many as the steps have."""
    triton.language.atomic_add(args[0] + q_idx * 0 + kv_idx * 0, triton.language.full(s.shape, 1, s.dtype))
    return s


@triton.jit
def one(s, batch, head, q_idx, kv_idx, args):
    return s * 0.0 + 1.0


@triton.jit
def count_questions(q_idx, kv_idx, batch, head, args):
    """Mask that keeps every pair and counts how many it is asked about."""
    pairs = q_idx * 0 + kv_idx * 0
    triton.language.atomic_add(args[0] + pairs, triton.language.full(pairs.shape, 1, pairs.dtype))
    return pairs >= 0


@triton.jit
def all_keys(q_idx, batch, head, args):
    return q_idx * 0, q_idx * 0 + 1000, q_idx >= 0


class Counted:
    """A call whose kernels count their steps, and those in which a mask is asked."""

    def __init__(self, tile, mask, q, k, **arguments):
        self.tile = tile
        self.visits, self.asked = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
        counter = tilewise.UserMask(count_questions, (self.asked,), interval=all_keys)
        self.arguments = arguments | dict(
            mask=counter if mask is None else counter & mask,
            score=tilewise.UserScore(count_steps, (self.visits,), derivative=one),
        )
        build = cached_request if "kv_lens" in arguments else request_of
        self.request = build(q, k, k, **self.arguments, impl="portable")

    def steps(self, run):
        self.visits.zero_(), self.asked.zero_()
        result, area = run(), self.tile.tile_q * self.tile.tile_kv
        return result, (int(self.visits) / area, int(self.asked) / area)

    def found(self) -> dict[str, tuple[float, float]]:
        (out, _, statistics), forward = self.steps(lambda: run_forward(self.request, True, True))

        def backward(of: int) -> tuple[float, float]:
            needs = [i == of for i in range(3 + len(self.request.other_tensors))]
            return self.steps(lambda: run_backward(self.request, out, statistics, out, None, needs))[1]

        counts = {"forward": forward, "dq": backward(0), "dkv": backward(1)}
        for i, (name, tensor) in enumerate(self.request.other_tensors):
            if tensor.requires_grad:
                counts[f"gradient of {name}"] = backward(3 + i)
        return counts
