"""What tests of `tilewise watch` have in common: small calls of every kind, what is learned in them being
trained, and what was recorded of them."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
import triton

import tilewise
from tilewise.kernels.tile import Tile
from tilewise.plan.request import request_of
from tilewise.tools.watch.record import Asked, record

TILE = Tile(16, 16)


def rows(*shape, seed=0, dtype=torch.float32):
    """Normal numbers in rows that do not lie one behind the other: every address counts."""
    *outer, length, dim = shape
    x = torch.randn(*outer, length, dim + 3, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype)[..., 2 : 2 + dim]


def dense(q_len=37, kv_len=37, heads=(2, 1), dims=(24, 40), dtype=torch.float32, batch=1, **arguments):
    q = rows(batch, heads[0], q_len, dims[0], seed=1, dtype=dtype)
    k = rows(batch, heads[1], kv_len, dims[0], seed=2, dtype=dtype)
    v = rows(batch, heads[1], kv_len, dims[1], seed=3, dtype=dtype)
    return request_of(q, k, v, **arguments)


def packed(**arguments):
    offsets = torch.tensor([0, 5, 5, 28])
    q, k, v = (rows(28, heads, 16, seed=seed) for heads, seed in ((4, 1), (2, 2), (2, 3)))
    return request_of(q, k, v, q_offsets=offsets, **arguments)


def paged(**arguments):
    """Two sequences in pages of 16 rows, in no order; the keys of each are split."""
    k, v = rows(6, 16, 2, 16, seed=2), rows(6, 16, 2, 16, seed=3)
    pages = torch.tensor([[4, 0, 5], [2, 3, 1]])
    return request_of(
        rows(2, 4, 3, 16, seed=1),
        k,
        v,
        kv_lens=torch.tensor([20, 45]),
        pages=pages,
        split_size=32,
        **arguments,
    )


@triton.jit
def odd_pairs(q_idx, kv_idx, batch, head, args):
    return (q_idx + kv_idx) % 2 == 0


def recorded(request, batch=None, head=1, tile=TILE):
    """The last of the batch, unless another is asked for."""
    batch = request.shape.batch - 1 if batch is None else batch
    return record(Asked(request, "a test", "tilewise watch", batch, head, tile))


def moments(walk):
    """(program, stage, moment) of a pass, in order."""
    return [
        (program, stage, moment)
        for program in walk.programs
        for stage in program.stages
        for moment in stage.moments
    ]


def last(recording, program, name):
    """What a variable of the kernel was at the end of a program."""
    return next(
        recording.arrays[moment.sets[name]]
        for stage in reversed(program.stages)
        for moment in reversed(stage.moments)
        if name in moment.sets and not moment.depth
    )


def memory(x, offset, count, column):
    """`count` fp32 numbers of a tensor from a byte on, `column` bytes apart."""
    address = x.data_ptr() + offset
    return np.array(
        [ctypes.c_float.from_address(address + i * column).value for i in range(count)], np.float32
    )


CALLS = {
    "sink, window, groups, bf16": lambda: dense(
        17, 33, (4, 2), (16, 16), torch.bfloat16, sink=torch.randn(4, requires_grad=True),
        mask=tilewise.Causal() & tilewise.Window(9, 0), batch=2,
    ),
    "cosine, bias, fp16": lambda: dense(
        17, 19, (2, 2), (16, 32), torch.float16, batch=2, mask=tilewise.Padding(torch.tensor([19, 7])),
        similarity=tilewise.Cosine(torch.full((2,), 10.0).requires_grad_()),
        bias=torch.randn(1, 2, 17, 19).half().requires_grad_(),
    ),
    "softcap, ALiBi, documents, dropout": lambda: dense(
        33, 33, score=[tilewise.Softcap(20.0), tilewise.ALiBi(tilewise.alibi_slopes(2).requires_grad_())],
        dropout_p=0.2, dropout_seed=torch.tensor([7]),
        mask=tilewise.Documents(torch.arange(33) // 9) & tilewise.Causal(),
    ),
    "pieces": lambda: dense(17, 17, (2, 2), (80, 72), mask=tilewise.Causal()),
    "packed": lambda: packed(mask=tilewise.Causal()),
    "paged": lambda: paged(mask=tilewise.Causal()),
}  # fmt: skip
