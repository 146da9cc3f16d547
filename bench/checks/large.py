"""Do many repeats give the same bits, and are offsets and grids beyond 32 and 16 bits right?"""

from __future__ import annotations

import functools

import torch

import tilewise
from harness.gradients import check_gradients

from .trial import NotApplicable, Trial, from_tests

Tensor = torch.Tensor


def inputs(
    device: torch.device, batch: int, heads: tuple[int, int], lengths: tuple[int, int], dim: int,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:  # fmt: skip
    """q, k, v and the gradient of out. heads: of queries and of keys; lengths likewise."""
    shapes = zip(heads, lengths, strict=True)
    q_shape, kv_shape = [(batch, count, length, dim) for count, length in shapes]
    return [torch.randn(s, device=device, dtype=dtype) for s in (q_shape, kv_shape, kv_shape, q_shape)]


def forward_and_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, *, causal: bool = False
) -> list[Tensor]:
    """out, lse, dq, dk and dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    mask = tilewise.Causal() if causal else None
    out, lse = tilewise.attention(*leaves, mask=mask, return_lse=True, impl="portable")
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, do)]


NAMES = ("out", "lse", "dq", "dk", "dv")


def same_bits(causal: bool, dim: int, device: torch.device, seed: int) -> str:
    """200 times the same call, forward and backward; in the interpreter, twice and tiny."""
    on_gpu = device.type == "cuda"
    times, length = (200, 4096) if on_gpu else (2, 35)
    q, k, v, do = inputs(device, 2, (16, 4) if on_gpu else (2, 1), (length, length), dim)
    first = forward_and_backward(q, k, v, do, causal=causal)
    differ = torch.zeros(len(first), dtype=torch.int64, device=device)
    for _ in range(times):
        again = forward_and_backward(q, k, v, do, causal=causal)
        differ += torch.stack([(one != other).any() for one, other in zip(first, again, strict=True)])
    for name, x in zip(NAMES, first, strict=True):
        assert bool(x.isfinite().all()) and bool(x.any()), f"{name} has no value, or values without end"
    found = dict(zip(NAMES, differ.tolist(), strict=True))
    assert not any(found.values()), f"of {times} repeats so many differed: {found}"
    return f"{times} repeats, length {length}"


def far_offsets(long: str, device: torch.device, seed: int) -> str:
    """More than 2³¹ elements of queries or of keys: the last head is as it is alone, and right."""
    on_gpu = device.type == "cuda"
    most, few = (131_136, 64) if on_gpu else (45, 18)
    lengths = (most, few) if long == "queries" else (few, most)
    heads, dim = (64, 128) if on_gpu else (2, 16)
    if on_gpu:
        enough_memory(device, gigabytes=40)
        assert 2 * heads * most * dim > 2**31
    q, k, v, do = inputs(device, 2, (heads, heads), lengths, dim)
    last = [x[-1:, -1:] for x in (q, k, v, do)]
    found = [x[-1:, -1:].clone() for x in forward_and_backward(q, k, v, do)]
    for name, got, want in zip(NAMES, found, forward_and_backward(*last), strict=True):
        differ = int((got != want).sum())
        assert not differ, (
            f"{differ} of {got.numel()} elements of the last head's {name} differ from it alone"
        )
    check_gradients(*last)
    return f"{2 * heads * most * dim} elements"


def enough_memory(device: torch.device, gigabytes: int) -> None:
    """Raise NotApplicable where the GPU has less than this free."""
    free, _ = torch.cuda.mem_get_info(device)
    if free < gigabytes * 1e9:
        raise NotApplicable(f"it needs {gigabytes} GB of GPU memory, and {free / 1e9:.0f} GB are free")


def far_case(name: str, gigabytes: int, device: torch.device, seed: int) -> str:
    """A case of tests/test_addresses.py."""
    import test_addresses

    if device.type == "cuda":
        enough_memory(device, gigabytes)
    test_addresses.CASES[name]()
    return "test_addresses"


def _far(name: str, gigabytes: int) -> Trial:
    return Trial(f"addresses: {name}", functools.partial(far_case, name, gigabytes), alone=True)


MANY_HEADS = "test_more_than_65535_batches_times_heads"

LARGE: list[Trial] = [
    Trial("the same bits again, causal, head_dim 128", functools.partial(same_bits, True, 128), alone=True),
    Trial("the last head of many queries", functools.partial(far_offsets, "queries"), alone=True),
    Trial("the last head of many keys", functools.partial(far_offsets, "keys"), alone=True),
    Trial("70,000 batches", from_tests("test_cuda", MANY_HEADS, 70_000, 1, 1), needs_gpu=True, alone=True),
    Trial("the same bits again, full, head_dim 64", functools.partial(same_bits, False, 64), alone=True),
    Trial(
        "the same bits again, everything trained",
        from_tests("test_cuda", "test_the_same_bits_two_hundred_times", torch.bfloat16),
        needs_gpu=True,
        alone=True,
    ),
    Trial("80,000 heads", from_tests("test_cuda", MANY_HEADS, 2, 40_000, 20_000), needs_gpu=True, alone=True),
    _far("more than 65,535 heads", 1),
    _far("bias × row", 12),
    _far("backward of do × row", 12),
    _far("more than 2³¹ rows", 65),
    _far("more than 2³¹ pairs", 12),
]
